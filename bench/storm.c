/* Steady new connections: `storm HOST PORT RATE SECONDS [STREAMS]`.
 *
 * One thread, one epoll set. RATE connections are started each second, whatever became of those
 * before (unless FULL are open: then they wait). Each sends up to 4 KiB, wants the same bytes back,
 * and closes; without a half-close, which nginx would answer by ending the session. Prints on one
 * line how many were served, refused, reset, cut (the end came early), wrong (other bytes), and
 * took over LIFE seconds.
 *
 * STREAMS connections beside those live as long as the storm: the same again and again, every byte
 * told by its position in the stream. One that ends is counted and opened anew. With them the line
 * goes on with the same six counts for streams, the bytes that came back on them, and the
 * milliseconds of the slowest connection since the last line. SECONDS 0: until the input ends;
 * each byte of input is answered by the line so far.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "tools.h"

enum { FULL = 2000, FDS = 65536, EVENTS = 256, LONGEST = 4096, LIFE = 15, STREAMS = 1000 };
/* A prime, so that no loss of whole buffers or pages goes unnoticed. */
enum { PERIOD = 65521 };
static const double REST = 0.01; /* seconds of a stream between two rounds */
enum outcome { SERVED, REFUSED, RESET, CUT, WRONG, LATE, OUTCOMES };

static struct connection {
    double began; /* of the connection, of a stream's round; 0: no connection */
    int length, received, is_sent;
    int stream;    /* 0: none, else its number from 1 */
    long position; /* where in the stream this round begins */
} connections[FDS];
static struct {
    int fd;
    double due; /* when its next round begins, or it is opened; 0: amid a round */
} streams[STREAMS + 1];
static char text[PERIOD + LONGEST];
static long counts[OUTCOMES], stream_counts[OUTCOMES], stream_bytes;
static double slowest;
static int epoll, open_count, stream_count, is_ending;

static const char *expected(const struct connection *c, int offset) {
    return text + (c->position + offset) % PERIOD;
}

static void end(int fd, enum outcome outcome) {
    struct connection *c = &connections[fd];
    if (c->stream) {
        stream_counts[outcome]++;
        streams[c->stream].fd = -1;
        streams[c->stream].due = now() + REST;
    } else {
        counts[outcome]++;
        if (outcome == SERVED && now() - c->began > slowest) slowest = now() - c->began;
    }
    c->began = 0;
    open_count--;
    close(fd); /* leaves the epoll set with it */
}

static enum outcome as_outcome(int error) { return error == ECONNREFUSED ? REFUSED : RESET; }

static void begin(const struct sockaddr_in *addr, int stream) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (fd < 0 || fd >= FDS) die("socket");
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT, .data.fd = fd};
    connections[fd] = (struct connection){now(), 1 + rand() % LONGEST, 0, 0, stream, 0};
    if (stream) {
        streams[stream].fd = fd;
        streams[stream].due = 0;
    }
    open_count++;
    if (connect(fd, (const struct sockaddr *)addr, sizeof *addr) < 0 && errno != EINPROGRESS) {
        if (errno == EADDRNOTAVAIL) die("connect"); /* out of ports: not the peer's fault */
        end(fd, as_outcome(errno));
    } else if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) < 0) {
        die("epoll_ctl");
    }
}

static void send_text(int fd) {
    struct connection *c = &connections[fd];
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size);
    /* 4 KiB always fit into an empty send buffer. */
    if (error == 0 && send(fd, expected(c, 0), c->length, MSG_NOSIGNAL) != c->length) error = errno;
    if (error != 0) {
        end(fd, as_outcome(error));
        return;
    }
    c->is_sent = 1;
    epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &event);
}

/* A stream has all of a round back: rest, unless the storm is over. */
static void end_round(int fd) {
    struct connection *c = &connections[fd];
    stream_bytes += c->length;
    c->position += c->length;
    if (is_ending)
        end(fd, SERVED);
    else
        streams[c->stream].due = now() + REST;
}

static void go_on_with_streams(const struct sockaddr_in *addr, double time) {
    for (int i = 1; i <= stream_count; i++) {
        int fd = streams[i].fd;
        if (streams[i].due == 0 || (time < streams[i].due && !is_ending)) continue;
        streams[i].due = 0;
        if (fd < 0 && !is_ending) {
            begin(addr, i);
        } else if (fd >= 0 && is_ending) {
            end(fd, SERVED);
            streams[i].due = 0;
        } else if (fd >= 0) {
            struct connection *c = &connections[fd];
            *c = (struct connection){time, 1 + rand() % LONGEST, 0, 0, i, c->position};
            send_text(fd);
        }
    }
}

static void receive(int fd) {
    static char data[LONGEST + 1];
    struct connection *c = &connections[fd];
    ssize_t got = recv(fd, data, sizeof data, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (got < 0)
        end(fd, RESET);
    else if (got == 0)
        end(fd, CUT);
    else if (c->received + got > c->length || memcmp(data, expected(c, c->received), got) != 0)
        end(fd, WRONG);
    else if ((c->received += got) < c->length)
        return;
    else if (c->stream)
        end_round(fd);
    else
        end(fd, SERVED);
}

static void end_the_late(double time) {
    for (int fd = 0; fd < FDS; fd++)
        if (connections[fd].began != 0 && time - connections[fd].began > LIFE &&
            !(connections[fd].stream && streams[connections[fd].stream].due != 0))
            end(fd, LATE);
}

static void report(void) {
    for (int i = 0; i < OUTCOMES; i++) printf("%ld ", counts[i]);
    if (stream_count > 0) {
        for (int i = 0; i < OUTCOMES; i++) printf("%ld ", stream_counts[i]);
        printf("%ld %.0f", stream_bytes, slowest * 1e3);
        slowest = 0;
    }
    printf("\n");
    fflush(stdout);
}

/* Whether the input has ended; each byte of it is answered. */
static int is_told_to_end(void) {
    struct pollfd input = {.fd = 0, .events = POLLIN};
    char byte;
    if (poll(&input, 1, 0) <= 0) return 0;
    if (read(0, &byte, 1) <= 0) return 1;
    report();
    return 0;
}

int main(int argc, char **argv) {
    struct epoll_event events[EVENTS];
    struct sockaddr_in addr = {.sin_family = AF_INET};
    if (argc < 5 || argc > 6 || inet_pton(AF_INET, argv[1], &addr.sin_addr) != 1) {
        fprintf(stderr, "usage: storm HOST PORT RATE SECONDS [STREAMS]\n");
        return 2;
    }
    addr.sin_port = htons(atoi(argv[2]));
    double rate = atof(argv[3]), start = now(), last = start, due = 0, swept = start;
    double seconds = atof(argv[4]);
    stream_count = argc == 6 ? atoi(argv[5]) : 0;
    if (stream_count > STREAMS) die("too many streams");
    for (int i = 0; i < PERIOD; i++) text[i] = rand();
    memcpy(text + PERIOD, text, LONGEST);
    epoll = epoll_create1(0);
    for (int i = 1; i <= stream_count; i++) begin(&addr, i);
    for (double time = start; !is_ending || open_count > 0; time = now()) {
        if (!is_ending) is_ending = seconds > 0 ? time >= start + seconds : is_told_to_end();
        due += (time - last) * rate;
        last = time;
        for (; due >= 1 && open_count < FULL; due--)
            if (!is_ending) begin(&addr, 0);
        go_on_with_streams(&addr, time);
        int count = epoll_wait(epoll, events, EVENTS, 2);
        for (int i = 0; i < count; i++) {
            int fd = events[i].data.fd;
            if (connections[fd].began == 0) continue; /* ended earlier in this batch */
            if (!connections[fd].is_sent)
                send_text(fd);
            else
                receive(fd);
        }
        if (time - swept > 1) end_the_late(swept = time);
    }
    report();
    return 0;
}

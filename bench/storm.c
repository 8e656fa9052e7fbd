/* Steady new connections for reload_under_load: `storm HOST PORT RATE SECONDS`.
 *
 * One thread, one epoll set. RATE connections are started each second, whatever became of those
 * before (unless FULL are open: then they wait). Each sends up to 4 KiB, wants the same bytes back,
 * and closes; without a half-close, which nginx would answer by ending the session. Prints on one
 * line how many were served, refused, reset, cut (the end came early), wrong (other bytes), and
 * took over LIFE seconds.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { FULL = 2000, FDS = 65536, EVENTS = 256, LONGEST = 4096, LIFE = 15 };
enum outcome { SERVED, REFUSED, RESET, CUT, WRONG, LATE, OUTCOMES };

static struct connection {
    double began; /* 0: no connection */
    int length, received, is_sent;
} connections[FDS];
static char text[LONGEST];
static long counts[OUTCOMES];
static int epoll, open_count;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void end(int fd, enum outcome outcome) {
    counts[outcome]++;
    connections[fd].began = 0;
    open_count--;
    close(fd); /* leaves the epoll set with it */
}

static enum outcome as_outcome(int error) { return error == ECONNREFUSED ? REFUSED : RESET; }

static void begin(const struct sockaddr_in *addr) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (fd < 0 || fd >= FDS) die("socket");
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT, .data.fd = fd};
    connections[fd] = (struct connection){now(), 1 + rand() % LONGEST, 0, 0};
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
    if (error == 0 && send(fd, text, c->length, MSG_NOSIGNAL) != c->length) error = errno;
    if (error != 0) {
        end(fd, as_outcome(error));
        return;
    }
    c->is_sent = 1;
    epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &event);
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
    else if (c->received + got > c->length || memcmp(data, text + c->received, got) != 0)
        end(fd, WRONG);
    else if ((c->received += got) == c->length)
        end(fd, SERVED);
}

static void end_the_late(double time) {
    for (int fd = 0; fd < FDS; fd++)
        if (connections[fd].began != 0 && time - connections[fd].began > LIFE) end(fd, LATE);
}

int main(int argc, char **argv) {
    struct epoll_event events[EVENTS];
    struct sockaddr_in addr = {.sin_family = AF_INET};
    if (argc != 5 || inet_pton(AF_INET, argv[1], &addr.sin_addr) != 1) {
        fprintf(stderr, "usage: storm HOST PORT RATE SECONDS\n");
        return 2;
    }
    addr.sin_port = htons(atoi(argv[2]));
    double rate = atof(argv[3]), start = now(), last = start, due = 0, swept = start;
    double until = start + atof(argv[4]);
    for (int i = 0; i < LONGEST; i++) text[i] = rand();
    epoll = epoll_create1(0);
    for (double time = start; time < until || open_count > 0; time = now()) {
        due += (time - last) * rate;
        last = time;
        for (; due >= 1 && open_count < FULL; due--)
            if (time < until) begin(&addr);
        int count = epoll_wait(epoll, events, EVENTS, 2);
        for (int i = 0; i < count; i++) {
            int fd = events[i].data.fd;
            if (!connections[fd].is_sent)
                send_text(fd);
            else
                receive(fd);
        }
        if (time - swept > 1) end_the_late(swept = time);
    }
    for (int i = 0; i < OUTCOMES; i++) printf("%ld ", counts[i]);
    printf("\n");
    return 0;
}

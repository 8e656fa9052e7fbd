/* Streams that last: `last HOST PORT STREAMS BULK PACE_MS`.
 *
 * One thread, one epoll set. STREAMS connections to an upstream that sends back what it gets, each
 * with one message of 1,000 bytes on its way, and the next PACE_MS after it has come back; and BULK
 * connections that always have 256 KiB on their way. What comes back is compared byte for byte with
 * what was sent, which no other stream says. One that ends is counted, and another one takes its place.
 *
 * Each line of input is answered by a line, of what was since the one before: lost streams older than
 * a second, younger ones, those with other bytes than were sent, connects that failed; then for each
 * stream that was open all the time, in microseconds, how long at most it waited for an answer.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MESSAGE = 1000, WINDOW = 262144, CHUNK = 65536, EVENTS = 256, MOST = 16384 };
enum { TURN_MS = 2 };
static const int64_t AGAIN_US = 20000, YOUNG_US = 1000000;

static struct stream {
    int fd, is_bulk, is_old;               /* old: open since before the last line of input */
    uint64_t id, sent, got;
    int64_t began, due, since, silence;    /* since: when something was last heard of it */
} streams[MOST];
static struct sockaddr_in target;
static int count, epoll;
static uint64_t ids;
static int64_t pace_us;
static long lost, young, wrong, failed;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static int64_t now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

/* splitmix64 */
static uint64_t word(uint64_t id, uint64_t number) {
    uint64_t z = id * 0x9e3779b97f4a7c15u + number * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static void say(unsigned char *data, size_t size, uint64_t id, uint64_t at) {
    uint64_t now = word(id, at >> 3);
    for (size_t i = 0; i < size; i++, at++) {
        if ((at & 7) == 0) now = word(id, at >> 3);
        data[i] = (unsigned char)(now >> ((at & 7) * 8));
    }
}

static void begin(struct stream *s, int64_t now) {
    int one = 1, is_bulk = s->is_bulk;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (fd < 0) die("socket");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    *s = (struct stream){.fd = fd, .is_bulk = is_bulk, .id = ++ids, .began = now, .since = now};
    if (connect(fd, (struct sockaddr *)&target, sizeof target) < 0 && errno != EINPROGRESS) {
        failed++;
        close(fd);
        s->fd = -1;
        s->due = now + AGAIN_US;
        return;
    }
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.u32 = s - streams};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) < 0) die("epoll_ctl");
}

static void end(struct stream *s, int64_t now) {
    if (!s->got)
        failed++;
    else if (now - s->began < YOUNG_US)
        young++;
    else
        lost++;
    close(s->fd);
    s->fd = -1;
    s->due = now + AGAIN_US;
}

/* Returns whether it goes on. */
static int send_some(struct stream *s, int64_t now) {
    static unsigned char data[CHUNK];
    uint64_t most = s->is_bulk ? WINDOW : MESSAGE;
    if (!s->is_bulk && s->sent % MESSAGE == 0 && (s->sent != s->got || now < s->due)) return 1;
    for (;;) {
        uint64_t room = s->is_bulk ? most - (s->sent - s->got) : most - s->sent % MESSAGE;
        size_t size = room < CHUNK ? room : CHUNK;
        if (!size) return 1;
        if (s->sent == s->got) s->since = now; /* it waits from now on */
        say(data, size, s->id, s->sent);
        ssize_t done = send(s->fd, data, size, MSG_NOSIGNAL);
        if (done < 0) return errno == EAGAIN;
        s->sent += done;
        if (!s->is_bulk && s->sent % MESSAGE == 0) return 1;
    }
}

static void hear(struct stream *s, int64_t now) {
    if (now - s->since > s->silence) s->silence = now - s->since;
    s->since = now;
}

static int receive(struct stream *s, int64_t now) {
    static unsigned char data[CHUNK], wanted[CHUNK];
    for (;;) {
        ssize_t size = recv(s->fd, data, sizeof data, 0);
        if (size < 0) return errno == EAGAIN;
        if (size == 0) return 0;
        hear(s, now);
        say(wanted, size, s->id, s->got);
        if (s->got + size > s->sent || memcmp(data, wanted, size)) {
            wrong++;
            return 0;
        }
        s->got += size;
        if (!s->is_bulk && s->got == s->sent) s->due = now + pace_us;
        if (s->is_bulk && !send_some(s, now)) return 0;
    }
}

static void answer_input(int64_t now) {
    char line[64];
    if (read(0, line, sizeof line) <= 0) exit(0);
    printf("%ld %ld %ld %ld", lost, young, wrong, failed);
    lost = young = wrong = failed = 0;
    for (struct stream *s = streams; s < streams + count; s++) {
        if (s->fd >= 0 && s->sent > s->got && now - s->since > s->silence) s->silence = now - s->since;
        if (s->fd >= 0 && s->is_old) printf(" %ld", (long)s->silence);
        s->is_old = s->fd >= 0 && s->got > 0;
        s->silence = 0;
        if (now > s->since) s->since = now; /* the next line is of the time from here on */
    }
    printf("\n");
    fflush(stdout);
}

int main(int argc, char **argv) {
    struct epoll_event events[EVENTS];
    if (argc != 6) return 2;
    target = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
    if (inet_pton(AF_INET, argv[1], &target.sin_addr) != 1) die(argv[1]);
    int plain = atoi(argv[3]), bulk = atoi(argv[4]);
    count = plain + bulk;
    pace_us = atoi(argv[5]) * 1000;
    if (count > MOST) die("too many");
    if ((epoll = epoll_create1(0)) < 0) die("epoll_create1");
    for (int i = 0; i < count; i++) streams[i].is_bulk = i >= plain, streams[i].fd = -1;
    struct pollfd input = {.fd = 0, .events = POLLIN};
    for (int64_t looked = 0;;) {
        int got = epoll_wait(epoll, events, EVENTS, TURN_MS);
        int64_t now = now_us();
        for (int i = 0; i < got; i++) {
            struct stream *s = &streams[events[i].data.u32];
            uint32_t what = events[i].events;
            if (s->fd < 0) continue;
            if ((what & ~EPOLLOUT && !receive(s, now)) || (what & EPOLLOUT && !send_some(s, now)))
                end(s, now);
        }
        if (now - looked < TURN_MS * 1000) continue;
        looked = now;
        for (struct stream *s = streams; s < streams + count; s++) {
            if (now < s->due) continue;
            if (s->fd < 0)
                begin(s, now);
            else if (!s->is_bulk && s->sent == s->got && s->got && !send_some(s, now))
                end(s, now);
        }
        if (poll(&input, 1, 0) > 0) answer_input(now);
    }
}

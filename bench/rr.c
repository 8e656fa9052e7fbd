/* Request/response load: `rr HOST PORT CONNECTIONS BYTES SECONDS`.
 *
 * Closed loop: each connection sends BYTES, waits until as many have come back, and sends again.
 * One thread, one epoll set. Prints one JSON object: the requests answered in the time, their rate,
 * and the median, 99th percentile and maximum of the latency in microseconds. A first exchange on
 * each connection, before the clock starts, makes sure that all are up. Exits 1 when one breaks.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>

#include "tools.h"

enum { EVENTS = 256 };

struct connection {
    int fd;
    size_t got;       /* bytes of the answer so far */
    uint64_t sent_ns; /* when the request was sent */
};

static char *request, *scratch;
static size_t request_bytes;

static uint32_t *latencies_ns; /* one per answer; 4.2 s at most, later ones are cut to that */
static size_t answers, room;

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + now.tv_nsec;
}

static void record(uint64_t latency_ns) {
    if (answers == room) {
        room = room ? room * 2 : 1 << 20;
        latencies_ns = realloc(latencies_ns, room * sizeof *latencies_ns);
        if (!latencies_ns) die("realloc");
    }
    latencies_ns[answers++] = latency_ns > UINT32_MAX ? UINT32_MAX : latency_ns;
}

static int connect_to(const char *host, int port) {
    struct sockaddr_in addr = {.sin_family = AF_INET, .sin_port = htons(port)};
    int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || inet_pton(AF_INET, host, &addr.sin_addr) != 1) die("socket");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(fd, (struct sockaddr *)&addr, sizeof addr) < 0) die("connect");
    return fd;
}

/* A request is far smaller than the socket buffer and the last one was answered: it fits whole. */
static void ask(struct connection *c) {
    c->got = 0;
    c->sent_ns = now_ns();
    if (send(c->fd, request, request_bytes, MSG_NOSIGNAL) != (ssize_t)request_bytes) die("send");
}

/* Read what has come. Returns 1 when the answer is whole. */
static int receive(struct connection *c, int flags) {
    ssize_t got = recv(c->fd, scratch, request_bytes - c->got, flags);
    if (got < 0 && errno == EAGAIN) return 0;
    if (got < 0) die("recv");
    if (got == 0) {
        fprintf(stderr, "rr: a connection was closed\n");
        exit(1);
    }
    c->got += got;
    return c->got == request_bytes;
}

static void open_all(struct connection *all, int count, const char *host, int port, int epoll) {
    for (int i = 0; i < count; i++) {
        struct connection *c = &all[i];
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
        c->fd = connect_to(host, port);
        if (epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &event) < 0) die("epoll_ctl");
        ask(c);
        while (!receive(c, 0)) continue;
    }
}

/* Ask on every connection until the deadline; what is still on its way then is not counted. */
static void run(struct connection *all, int count, int epoll, uint64_t deadline_ns) {
    struct epoll_event events[EVENTS];
    for (int i = 0; i < count; i++) ask(&all[i]);
    while (now_ns() < deadline_ns) {
        int ready = epoll_wait(epoll, events, EVENTS, 100);
        if (ready < 0 && errno != EINTR) die("epoll_wait");
        for (int i = 0; i < ready; i++) {
            struct connection *c = events[i].data.ptr;
            if (!receive(c, MSG_DONTWAIT)) continue;
            record(now_ns() - c->sent_ns);
            ask(c);
        }
    }
}

static int by_value(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static void report(double seconds) {
    qsort(latencies_ns, answers, sizeof *latencies_ns, by_value);
    printf("{\"requests\": %zu, \"requests_per_s\": %.1f, \"p50_us\": %.1f, \"p99_us\": %.1f, "
           "\"max_us\": %.1f}\n",
           answers, answers / seconds, latencies_ns[answers / 2] / 1e3,
           latencies_ns[answers * 99 / 100] / 1e3, latencies_ns[answers - 1] / 1e3);
}

int main(int argc, char **argv) {
    if (argc != 6) {
        fprintf(stderr, "usage: rr HOST PORT CONNECTIONS BYTES SECONDS\n");
        return 2;
    }
    int count = atoi(argv[3]), epoll = epoll_create1(0);
    struct connection *all = calloc(count, sizeof *all);
    request_bytes = atoi(argv[4]);
    request = calloc(1, request_bytes);
    scratch = malloc(request_bytes);
    if (!all || !request || !scratch) die("malloc");
    open_all(all, count, argv[1], atoi(argv[2]), epoll);
    uint64_t start_ns = now_ns();
    run(all, count, epoll, start_ns + (uint64_t)(atof(argv[5]) * 1e9));
    double seconds = (now_ns() - start_ns) / 1e9;
    if (answers == 0) {
        fprintf(stderr, "rr: no answer in the whole time\n");
        return 1;
    }
    report(seconds);
    return 0;
}

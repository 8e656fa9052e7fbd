/* Steady new connections, each told apart: `knock HOST PORT RATE SECONDS [HOLD_MS [TOTAL]]`.
 *
 * One thread, one epoll set. RATE connections are started each second, whatever became of those
 * before; each waits for the first line (see greet.c), stays for HOLD_MS, and closes. Prints a line
 * for each: when it began (CLOCK_MONOTONIC, microseconds), how many microseconds it took from
 * connect to the line, what became of it (served, refused, reset, cut, late), and the line.
 * It is late after LIFE seconds. With TOTAL it ends after so many, if that is earlier. On SIGTERM it
 * starts no more, and ends when those that it has started have ended.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "tools.h"

enum { FDS = 65536, EVENTS = 256, LIFE = 15 };

static struct connection {
    double began; /* 0: no connection */
    double until; /* is held until then; 0: no answer yet */
} connections[FDS];
static int epoll, open_count, highest;
static volatile sig_atomic_t is_ending;

static void say(const struct connection *c, const char *outcome, const char *line) {
    printf("%.0f %.0f %s %s\n", c->began * 1e6, (now() - c->began) * 1e6, outcome, line);
}

static void end(int fd) {
    connections[fd].began = 0;
    open_count--;
    close(fd);
}

static void on_term(int number) {
    (void)number;
    is_ending = 1;
}

static void fail(int fd, int error) {
    say(&connections[fd], error == 0 ? "cut" : error == ECONNREFUSED ? "refused" : "reset", "-");
    end(fd);
}

static void begin(const struct sockaddr_in *addr) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (fd < 0 || fd >= FDS) die("socket");
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    connections[fd] = (struct connection){.began = now()};
    if (fd > highest) highest = fd;
    open_count++;
    if (connect(fd, (const struct sockaddr *)addr, sizeof *addr) < 0 && errno != EINPROGRESS) {
        if (errno == EADDRNOTAVAIL) die("connect"); /* out of ports: not the peer's fault */
        fail(fd, errno);
    } else if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) < 0) {
        die("epoll_ctl");
    }
}

static void receive(int fd, double hold) {
    char line[64];
    struct connection *c = &connections[fd];
    ssize_t got = recv(fd, line, sizeof line - 1, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (c->until > 0) { /* a held one that the other side has ended */
        end(fd);
    } else if (got <= 0) {
        fail(fd, got < 0 ? errno : 0);
    } else {
        line[got] = 0;
        line[strcspn(line, "\n")] = 0;
        say(c, "served", line);
        c->until = now() + hold;
        if (hold <= 0) end(fd);
    }
}

static void look_at_time(double time) {
    for (int fd = 0; fd <= highest; fd++) {
        struct connection *c = &connections[fd];
        if (c->began == 0) continue;
        if (c->until > 0 && time >= c->until) {
            end(fd);
        } else if (c->until == 0 && time - c->began > LIFE) {
            say(c, "late", "-");
            end(fd);
        }
    }
}

int main(int argc, char **argv) {
    struct epoll_event events[EVENTS];
    struct sockaddr_in addr = {.sin_family = AF_INET};
    if (argc < 5 || argc > 7 || inet_pton(AF_INET, argv[1], &addr.sin_addr) != 1) {
        fprintf(stderr, "usage: knock HOST PORT RATE SECONDS [HOLD_MS [TOTAL]]\n");
        return 2;
    }
    addr.sin_port = htons(atoi(argv[2]));
    double rate = atof(argv[3]), seconds = atof(argv[4]);
    double hold = argc > 5 ? atof(argv[5]) / 1e3 : 0;
    long total = argc > 6 ? atol(argv[6]) : -1;
    double start = now(), last = start, due = 0, looked = start;
    epoll = epoll_create1(0);
    signal(SIGTERM, on_term);
    for (double time = start;; time = now()) {
        int is_over = is_ending || time >= start + seconds || total == 0;
        if (is_over && open_count == 0) break;
        due += (time - last) * rate;
        last = time;
        for (; due >= 1 && !is_over && total != 0; due--) {
            if (total > 0) total--;
            begin(&addr);
        }
        int count = epoll_wait(epoll, events, EVENTS, 1);
        for (int i = 0; i < count; i++)
            if (connections[events[i].data.fd].began != 0) receive(events[i].data.fd, hold);
        if (time - looked > (hold > 0 ? 0.002 : 0.5)) look_at_time(looked = time);
    }
    return 0;
}

/* Echo server for the rr and idle measures: `echo HOST PORT`.
 *
 * One thread, one epoll set, level-triggered, no state per connection. Sends back what it gets,
 * says nothing by itself. Not a general server: while one peer does not read, all wait.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tools.h"

enum { EVENTS = 256, CHUNK = 65536 };

static void accept_all(int epoll, int listener) {
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) watch(epoll, fd);
    if (errno != EAGAIN && errno != ECONNABORTED) die("accept");
}

/* Send everything, waiting for room. Returns 0, or -1 when the connection is broken. */
static int send_all(int fd, const char *data, size_t left) {
    while (left > 0) {
        ssize_t sent = send(fd, data, left, MSG_NOSIGNAL);
        if (sent >= 0) {
            data += sent;
            left -= sent;
        } else if (errno == EAGAIN) {
            struct pollfd room = {.fd = fd, .events = POLLOUT};
            poll(&room, 1, -1);
        } else {
            return -1;
        }
    }
    return 0;
}

static void answer(int fd) {
    static char data[CHUNK];
    ssize_t got = recv(fd, data, sizeof data, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0 || send_all(fd, data, got) < 0) close(fd); /* leaves the epoll set with it */
}

int main(int argc, char **argv) {
    struct epoll_event events[EVENTS];
    if (argc != 3) {
        fprintf(stderr, "usage: echo HOST PORT\n");
        return 2;
    }
    int listener = listen_on(argv[1], atoi(argv[2]));
    int epoll = epoll_create1(0);
    watch(epoll, listener);
    for (;;) {
        int count = epoll_wait(epoll, events, EVENTS, -1);
        if (count < 0 && errno != EINTR) die("epoll_wait");
        for (int i = 0; i < count; i++) {
            if (events[i].data.fd == listener)
                accept_all(epoll, listener);
            else
                answer(events[i].data.fd);
        }
    }
}

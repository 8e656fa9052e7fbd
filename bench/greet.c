/* Servers that say who they are: `greet HOST PORT`.
 *
 * One thread, one epoll set. A client is sent the address that it has reached, as in "127.0.0.2\n",
 * and nothing more; what it sends is thrown away, and when it ends its connection is closed. With
 * HOST 0.0.0.0 it is as many servers as loopback has addresses. Each line of input is answered by a
 * line per address that had clients: address, open now, most at once, all; then an empty line.
 *
 * Most at once is exact: what a client, or the program between, has closed before another came does
 * not count with it, even if the end has not been read yet. So each accept looks at all open
 * connections of the same address.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tools.h"

enum { EVENTS = 256, CHUNK = 65536, FDS = 65536, SERVERS = 65536 };

static struct server {
    int first;             /* its newest connection, 0: none */
    int open, most, total;
} servers[SERVERS];        /* by the last 16 bits of the address */
static struct connection {
    int server, next, previous; /* a list of those of one server */
} connections[FDS];

static void end(int fd) {
    struct connection *c = &connections[fd];
    struct server *s = &servers[c->server];
    if (c->previous)
        connections[c->previous].next = c->next;
    else
        s->first = c->next;
    if (c->next) connections[c->next].previous = c->previous;
    s->open--;
    c->server = -1;
    close(fd); /* leaves the epoll set with it */
}

/* Throw away what has come. */
static void read_all(int fd) {
    static char data[CHUNK];
    ssize_t got;
    do got = recv(fd, data, sizeof data, 0);
    while (got > 0);
    if (got == 0 || errno != EAGAIN) end(fd);
}

static void greet(int epoll, int fd) {
    struct sockaddr_in own;
    socklen_t size = sizeof own;
    char text[INET_ADDRSTRLEN + 1];
    if (fd >= FDS) die("too many");
    if (getsockname(fd, (struct sockaddr *)&own, &size) < 0) die("getsockname");
    int number = ntohl(own.sin_addr.s_addr) % SERVERS;
    struct server *s = &servers[number];
    for (int next, other = s->first; other; other = next) {
        next = connections[other].next;
        read_all(other);
    }
    connections[fd] = (struct connection){number, s->first, 0};
    if (s->first) connections[s->first].previous = fd;
    s->first = fd;
    s->total++;
    if (++s->open > s->most) s->most = s->open;
    inet_ntop(AF_INET, &own.sin_addr, text, sizeof text);
    size_t length = strlen(text);
    text[length++] = '\n';
    if (send(fd, text, length, MSG_NOSIGNAL) != (ssize_t)length)
        end(fd);
    else
        watch(epoll, fd);
}

static void accept_all(int epoll, int listener) {
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) greet(epoll, fd);
    if (errno != EAGAIN && errno != ECONNABORTED) die("accept");
}

static void answer_input(void) {
    char line[64];
    if (read(0, line, sizeof line) <= 0) exit(0);
    for (int i = 0; i < SERVERS; i++)
        if (servers[i].total > 0)
            printf("127.0.%d.%d %d %d %d\n", i >> 8, i & 255, servers[i].open, servers[i].most,
                   servers[i].total);
    printf("\n");
    fflush(stdout);
}

int main(int argc, char **argv) {
    struct epoll_event events[EVENTS];
    if (argc != 3) {
        fprintf(stderr, "usage: greet HOST PORT\n");
        return 2;
    }
    for (int i = 0; i < FDS; i++) connections[i].server = -1;
    int listener = listen_on(argv[1], atoi(argv[2]));
    int epoll = epoll_create1(0);
    watch(epoll, listener);
    watch(epoll, 0);
    for (;;) {
        int count = epoll_wait(epoll, events, EVENTS, -1);
        if (count < 0 && errno != EINTR) die("epoll_wait");
        for (int i = 0; i < count; i++) {
            int fd = events[i].data.fd;
            if (fd == listener)
                accept_all(epoll, listener);
            else if (fd == 0)
                answer_input();
            else if (connections[fd].server >= 0)
                read_all(fd);
        }
    }
}

/* Many UDP clients for udp_flows: `udp_flows HOST PORT UPSTREAM_PORT flood|live CLIENTS SECONDS`.
 *
 * One thread is the clients, each with a socket of its own, and the upstream. flood: each client
 * sends one datagram. live: clients in turn ask and are answered, for SECONDS. At most WINDOW
 * datagrams are under way; if none arrives for STALL seconds, those are lost and others are sent.
 * Prints one line of JSON, then keeps the sockets until the standard input ends.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "tools.h"

enum { WINDOW = 128, BYTES = 200, EVENTS = 256, BUFFER = 4 << 20 };
static const double STALL = 0.2;

static int *clients, epoll, upstream, client_count;
static long sent, arrived, answered, lost, under_way;
static char seen[65536];

static int make(struct sockaddr_in *bind_to, struct sockaddr_in *connect_to) {
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0), size = BUFFER;
    if (fd < 0) die("socket");
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
    if (bind_to && bind(fd, (struct sockaddr *)bind_to, sizeof *bind_to)) die("bind");
    if (connect_to && connect(fd, (struct sockaddr *)connect_to, sizeof *connect_to))
        die("connect");
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event)) die("epoll_ctl");
    return fd;
}

static void hear_upstream(int answers) {
    char text[BYTES];
    struct sockaddr_in from;
    socklen_t length = sizeof from;
    ssize_t count;
    while ((count = recvfrom(upstream, text, sizeof text, 0, (struct sockaddr *)&from, &length)) >= 0) {
        arrived++;
        seen[ntohs(from.sin_port)] = 1;
        if (answers)
            sendto(upstream, text, count, 0, (struct sockaddr *)&from, length);
        else
            under_way--;
        length = sizeof from;
    }
}

static void turn(int answers) {
    struct epoll_event events[EVENTS];
    char text[BYTES];
    int count = epoll_wait(epoll, events, EVENTS, 10);
    for (int i = 0; i < count; i++) {
        if (events[i].data.fd == upstream)
            hear_upstream(answers);
        else
            while (recv(events[i].data.fd, text, sizeof text, 0) >= 0) answered++, under_way--;
    }
}

static void run(int answers, double seconds) {
    static const char text[BYTES];
    double begin = now(), last = begin, t = begin;
    long before = 0;
    while (answers ? t < begin + seconds : sent < client_count) {
        while (under_way < WINDOW && (answers || sent < client_count)) {
            send(clients[sent % client_count], text, sizeof text, 0);
            sent++;
            under_way++;
        }
        turn(answers);
        t = now();
        if (arrived + answered != before) {
            before = arrived + answered;
            last = t;
        } else if (t - last > STALL) {
            lost += under_way;
            under_way = 0;
            last = t;
        }
    }
    while (now() - last < STALL && under_way > 0) {
        turn(answers);
        if (arrived + answered != before) before = arrived + answered, last = now();
    }
    int flows = 0;
    for (int i = 0; i < 65536; i++) flows += seen[i];
    printf("{\"seconds\": %f, \"sent\": %ld, \"arrived\": %ld, \"answered\": %ld, \"flows\": %d}\n",
           last - begin, sent, arrived, answered, flows);
    fflush(stdout);
}

int main(int argc, char **argv) {
    if (argc != 7) return 2;
    struct sockaddr_in target = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
    if (!inet_aton(argv[1], &target.sin_addr)) return 2;
    struct sockaddr_in own = target;
    own.sin_port = htons(atoi(argv[3]));
    client_count = atoi(argv[5]);
    clients = calloc(client_count, sizeof *clients);
    epoll = epoll_create1(0);
    upstream = make(&own, NULL);
    for (int i = 0; i < client_count; i++) clients[i] = make(NULL, &target);
    run(!strcmp(argv[4], "live"), atof(argv[6]));
    while (getchar() != EOF) continue;
    return 0;
}

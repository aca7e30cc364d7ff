/* What the two reference clients on bare sockets share: opening the streams,
 * one epoll, reading. The client gives ref_take(), which is told of the bytes
 * of each read and says whether the response is complete.
 *
 * Reads are 64 KiB into one buffer, as the header's plain-socket transport
 * does it: else the sizes of the reads would be compared, not the work. */
#ifndef REF_H
#define REF_H

#include "bench.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stddef.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#define REF_READ 65536
#define REF_ROOM 4096 /* before it, for what was left of the last read */
#define REF_SLICE 256 /* connections that are opened between two waits */

typedef struct ref_stream {
    char *text;
    char *rest; /* an event of which not all has come */
    uint32_t len, cap, rest_len;
    uint32_t tail_len;
    char tail[8];
    int fd;
    uint32_t seed;
    uint8_t connected, body;
} ref_stream;

static char ref_buffer[REF_ROOM + REF_READ];

/* 1: complete, 0: more is to come, -1: it makes no sense. */
static int ref_take(ref_stream *s, char *bytes, size_t len);
/* The text is complete. */
static void ref_done(ref_stream *s);

static struct {
    int epoll_fd, port;
    unsigned n, tokens, open, started;
    ref_stream *streams;
} ref;

static inline void ref_close(ref_stream *s, int failed)
{
    if (s->fd < 0) return;
    close(s->fd);
    s->fd = -1;
    ref.open--;
    if (failed) bench.errors++;
    else ref_done(s);
}

static inline void ref_open(ref_stream *s, uint32_t seed)
{
    struct sockaddr_in a = { .sin_family = AF_INET };
    struct epoll_event ev = { .events = EPOLLOUT };
    int one = 1;

    s->seed = seed;
    a.sin_port = htons((uint16_t)ref.port);
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    s->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    ref.open++;
    if (s->fd < 0) {
        ref.open--;
        bench.errors++;
        return;
    }
    setsockopt(s->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    ev.data.ptr = s;
    if ((connect(s->fd, (struct sockaddr *)&a, sizeof a) != 0 &&
         errno != EINPROGRESS) ||
        epoll_ctl(ref.epoll_fd, EPOLL_CTL_ADD, s->fd, &ev) != 0)
        ref_close(s, 1);
}

/* The same members as the header sends. */
static inline void ref_send(ref_stream *s)
{
    struct epoll_event ev = { .events = EPOLLIN };
    char body[512], head[512];
    int b, h;

    b = snprintf(body, sizeof body,
                 "{\"messages\":[{\"role\":\"user\",\"content\":"
                 "\"Tell me a joke\"}],\"model\":\"gpt-4o-mini\","
                 "\"stream\":true,\"stream_options\":{\"include_usage\":true}"
                 ",\"max_tokens\":%u,\"seed\":%u}", ref.tokens, s->seed);
    h = snprintf(head, sizeof head,
                 "POST /v1/chat/completions HTTP/1.1\r\n"
                 "Host: 127.0.0.1:%d\r\nContent-Length: %d\r\n"
                 "Content-Type: application/json\r\n"
                 "Accept: text/event-stream\r\n\r\n%s", ref.port, b, body);
    ev.data.ptr = s;
    s->connected = 1;
    if (send(s->fd, head, (size_t)h, MSG_NOSIGNAL) != h ||
        epoll_ctl(ref.epoll_fd, EPOLL_CTL_MOD, s->fd, &ev) != 0)
        ref_close(s, 1);
}

static inline void ref_read(ref_stream *s)
{
    char *at = ref_buffer + REF_ROOM;
    ssize_t n = recv(s->fd, at, REF_READ, 0);
    int r;

    bench.reads++;
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (n <= 0) {
        ref_close(s, 1);
        return;
    }
    bench.wire += (uint64_t)n;
    r = ref_take(s, at, (size_t)n);
    if (r) ref_close(s, r < 0);
}

/* -p PORT -n STREAMS -t TOKENS */
static inline int ref_main(int argc, char **argv, const char *name)
{
    struct epoll_event ev[128];
    unsigned i;
    int opt, k, n;

    ref.n = 1;
    ref.tokens = 100;
    while ((opt = getopt(argc, argv, "p:n:t:x:H:k:")) != -1) {
        if (opt == 'p') ref.port = atoi(optarg);
        else if (opt == 'n') ref.n = (unsigned)atoi(optarg);
        else if (opt == 't') ref.tokens = (unsigned)atoi(optarg);
    }
    if (ref.port <= 0) {
        fprintf(stderr, "usage: %s -p PORT -n STREAMS -t TOKENS\n", argv[0]);
        return 2;
    }
    bench_begin(ref.n, (uint64_t)ref.tokens);
    ref.streams = (ref_stream *)calloc(ref.n, sizeof *ref.streams);
    ref.epoll_fd = epoll_create1(0);
    if (!ref.streams || ref.epoll_fd < 0) return 2;
    while (ref.open || ref.started < ref.n) {
        for (i = 0; i < REF_SLICE && ref.started < ref.n; i++, ref.started++)
            ref_open(&ref.streams[ref.started], ref.started);
        n = epoll_wait(ref.epoll_fd, ev, 128, ref.started < ref.n ? 0 : -1);
        bench.waits++;
        for (k = 0; k < n; k++) {
            ref_stream *s = (ref_stream *)ev[k].data.ptr;
            if (s->fd < 0) continue;
            if (s->connected) ref_read(s);
            else ref_send(s);
        }
    }
    return bench_end(name);
}

#endif

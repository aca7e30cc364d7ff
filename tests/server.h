/* A scripted HTTP server on the loopback, in one thread of the test program.
 *
 *     server_script script = { .bytes = "HTTP/1.1 204 No Content\r\n\r\n",
 *                              .end = SERVER_CLOSE };
 *     server *s = server_start(&script, 1);
 *     ... a call to server_base(s) ...
 *     CHECK_INT(server_requests(s), 1);
 *     CHECK(strstr(server_request(s, 0)->head, "POST /v1/chat"));
 *     server_stop(s);
 *
 * Or from a recording, with NAME-2.http ... as the answers that follow and
 * the write borders of NAME.segments.json:
 *
 *     server *s = server_start_fixture("tests/fixtures/joke.http");
 *
 * The k-th request gets the k-th script, whatever connection it comes on;
 * from the last script on, all get that one. Scripts are copied. A script
 * that is `at_accept` (or ends with SERVER_ACCEPT_...) is used up by a
 * connection when it is accepted, before anything is read from it.
 *
 * A segment is a border between two writes: the bytes up to the next border
 * go out in a send of their own, delay_ms after those before. A segment at
 * `len` delays the end. With SERVER_HOLD for the delay the server stops
 * there until server_go() is called, so that a test needs no sleep:
 *
 *     server_wait_held(s, 1);    all before the border is on its way
 *     ...
 *     server_go(s);
 *
 * What a test waits for is a condition: server_wait_requests, _connections,
 * _closed, _sent, _held. Each gives up after SERVER_WAIT_MS and says so, and
 * the whole server ends after SERVER_LIFE_MS, so that no test can hang here.
 *
 * All functions may be called from any thread; what they return a pointer to
 * is valid until server_stop. */
#ifndef SERVER_H
#define SERVER_H

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif

#define SERVER_WAIT_MS 20000
#define SERVER_LIFE_MS 60000

/* What happens when all bytes of a script are sent. */
typedef enum server_end {
    SERVER_KEEP,         /* the connection serves the next request */
    SERVER_CLOSE,        /* end of file for the client */
    SERVER_RST,          /* a reset; on a unix socket just a close */
    SERVER_STALL,        /* stays open; what the client sends is ignored */
    SERVER_ACCEPT_CLOSE, /* end of file before anything was read or sent */
    SERVER_ACCEPT_RST    /* a reset likewise */
} server_end;

#define SERVER_HOLD (-1L) /* a delay until server_go() */

typedef struct server_segment {
    size_t offset;
    long delay_ms;
} server_segment;

typedef struct server_script {
    const char *bytes;
    size_t len; /* 0: up to the NUL */
    const server_segment *segments;
    size_t n_segments;
    server_end end;
    int trickle;   /* every byte in a send of its own */
    int at_accept; /* send without waiting for a request */
} server_script;

/* A request as it came. */
typedef struct server_req {
    const char *head; /* request line and fields with the empty line; a NUL
                         behind it */
    size_t head_len;
    const char *body; /* a NUL behind it */
    size_t body_len;
    size_t conn;   /* on which connection, 0 the first */
    long at_ms;    /* when it was complete, since server_start */
} server_req;

/* How a connection ended. */
typedef enum server_closed {
    SERVER_OPEN,     /* it did not */
    SERVER_FIN,      /* the client closed it */
    SERVER_GOT_RST,  /* the client reset it, or closed it with unread bytes */
    SERVER_CLOSED_IT /* the server did, with a reset */
} server_closed;

/* ---- inside ----------------------------------------------------------- */

typedef enum server_state {
    SERVER_READING, /* a request, or waiting for one */
    SERVER_WRITING, /* a script */
    SERVER_DEAF     /* stalled or shut down: reads and forgets */
} server_state;

typedef struct server_conn {
    /* Shared, under the lock. */
    server_closed closed;
    size_t sent;
    /* The thread's own. */
    int fd; /* -1: gone */
    size_t number;
    server_state state;
    char *in;
    size_t in_len, in_cap;
    int eof, want_write;
    const server_script *script;
    size_t pos, seg;
    int armed; /* the delay of segment `seg` has begun */
    long due;
} server_conn;

typedef struct server {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    pthread_t thread;
    int listener, wake[2];
    int port;
    char *path;
    char base[160];
    struct timespec began;
    server_script *scripts;
    size_t n_scripts, next_script; /* the latter is the thread's own */
    /* Under the lock. */
    server_conn **conns;
    size_t n_conns, cap_conns;
    server_req **reqs;
    size_t n_reqs, cap_reqs;
    size_t sent, held, go;
    int stop, ended;
    /* The thread's own. */
    server_conn **live;
    struct pollfd *fds;
    size_t n_live, cap_live, cap_fds, go_used;
    int deaf_listener;
} server;

static inline void *server_grow(void *p, size_t n, size_t *cap, size_t size)
{
    if (n < *cap) return p;
    *cap = *cap ? *cap * 2 : 16;
    if (*cap <= n) *cap = n + 1;
    p = realloc(p, *cap * size);
    if (!p) abort();
    return p;
}

static inline void *server_copy(const void *p, size_t len)
{
    char *q = (char *)malloc(len + 1);

    if (!q) abort();
    if (len) memcpy(q, p, len);
    q[len] = 0;
    return q;
}

static inline long server_now(const server *s)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (long)(t.tv_sec - s->began.tv_sec) * 1000 +
           (t.tv_nsec - s->began.tv_nsec) / 1000000;
}

static inline void server_fd_flags(int fd)
{
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    fcntl(fd, F_SETFD, FD_CLOEXEC);
}

/* The first end that is seen counts. */
static inline void server_mark(server *s, server_conn *c, server_closed how)
{
    pthread_mutex_lock(&s->lock);
    if (c->closed == SERVER_OPEN) c->closed = how;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
}

static inline void server_drop(server *s, server_conn *c, int reset)
{
    if (c->fd < 0) return;
    if (reset) {
        struct linger now = { 1, 0 };
        setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    }
    close(c->fd);
    c->fd = -1;
    free(c->in);
    c->in = NULL;
    c->in_len = c->in_cap = 0;
    s->deaf_listener = 0;
}

static inline int server_at_accept(const server_script *p)
{
    return p->at_accept || p->end == SERVER_ACCEPT_CLOSE ||
           p->end == SERVER_ACCEPT_RST;
}

static inline const server_script *server_take(server *s)
{
    const server_script *p = &s->scripts[s->next_script];

    if (s->next_script + 1 < s->n_scripts) s->next_script++;
    return p;
}

static inline void server_answer(server_conn *c, const server_script *p)
{
    c->script = p;
    c->state = SERVER_WRITING;
    c->pos = c->seg = 0;
    c->armed = 0;
}

static inline void server_end_script(server *s, server_conn *c)
{
    server_end end = c->script->end;

    pthread_mutex_lock(&s->lock);
    s->sent++;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    c->script = NULL;
    switch (end) {
    case SERVER_KEEP:
        c->state = SERVER_READING;
        break;
    case SERVER_CLOSE:
    case SERVER_ACCEPT_CLOSE:
        /* Not close(): with unread bytes that would be a reset. */
        shutdown(c->fd, SHUT_WR);
        c->state = SERVER_DEAF;
        break;
    case SERVER_RST:
    case SERVER_ACCEPT_RST:
        server_mark(s, c, SERVER_CLOSED_IT);
        server_drop(s, c, 1);
        break;
    case SERVER_STALL:
        c->state = SERVER_DEAF;
        break;
    }
}

/* Sends what is due. Returns when there is something to wait for: c->due,
 * room to write, server_go, or the next request. */
static inline void server_write(server *s, server_conn *c)
{
    const server_script *p = c->script;
    int budget = 1024; /* sends, so that others get their turn */

    c->want_write = 0;
    while (c->state == SERVER_WRITING && c->fd >= 0) {
        if (c->seg < p->n_segments && p->segments[c->seg].offset <= c->pos) {
            long delay = p->segments[c->seg].delay_ms;

            if (!c->armed) {
                c->armed = 1;
                c->due = delay > 0 ? server_now(s) + delay : 0;
                if (delay == SERVER_HOLD) {
                    pthread_mutex_lock(&s->lock);
                    s->held++;
                    pthread_cond_broadcast(&s->changed);
                    pthread_mutex_unlock(&s->lock);
                }
            }
            if (delay == SERVER_HOLD) {
                int pass;

                pthread_mutex_lock(&s->lock);
                pass = s->go > s->go_used;
                pthread_mutex_unlock(&s->lock);
                if (!pass) return;
                s->go_used++;
            } else if (delay > 0 && server_now(s) < c->due) {
                return;
            }
            c->seg++;
            c->armed = 0;
        } else if (c->pos < p->len) {
            size_t stop = p->len;
            ssize_t k;

            if (c->seg < p->n_segments && p->segments[c->seg].offset < stop)
                stop = p->segments[c->seg].offset;
            if (p->trickle) stop = c->pos + 1;
            if (budget-- == 0) {
                c->want_write = 1;
                return;
            }
            k = send(c->fd, p->bytes + c->pos, stop - c->pos, MSG_NOSIGNAL);
            if (k < 0 && errno == EINTR) continue;
            if (k < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
                c->want_write = 1;
                return;
            }
            if (k < 0) {
                server_mark(s, c, SERVER_GOT_RST);
                server_drop(s, c, 0);
                return;
            }
            c->pos += (size_t)k;
            pthread_mutex_lock(&s->lock);
            c->sent += (size_t)k;
            pthread_mutex_unlock(&s->lock);
        } else {
            server_end_script(s, c);
        }
    }
}

/* The value of a field in a head, or NULL. */
static inline const char *server_field(const char *head, const char *name,
                                       size_t *len)
{
    size_t n = strlen(name);
    const char *line = strstr(head, "\r\n");

    for (; line; line = strstr(line, "\r\n")) {
        line += 2;
        if (strncasecmp(line, name, n) == 0 && line[n] == ':') {
            const char *v = line + n + 1;
            v += strspn(v, " \t");
            *len = strcspn(v, "\r");
            return v;
        }
    }
    return NULL;
}

/* Takes one request from what has been read, if it is whole. */
static inline int server_parse(server *s, server_conn *c)
{
    size_t head = 0, body = 0, len;
    const char *v;
    server_req *r;

    for (size_t i = 3; i < c->in_len && !head; i++)
        if (memcmp(c->in + i - 3, "\r\n\r\n", 4) == 0) head = i + 1;
    if (!head) return 0;
    r = (server_req *)calloc(1, sizeof *r);
    if (!r) abort();
    r->head = (const char *)server_copy(c->in, head);
    v = server_field(r->head, "Content-Length", &len);
    if (v) body = (size_t)strtoul(v, NULL, 10);
    if (c->in_len - head < body) {
        free((void *)r->head);
        free(r);
        return 0;
    }
    r->head_len = head;
    r->body = (const char *)server_copy(c->in + head, body);
    r->body_len = body;
    r->conn = c->number;
    r->at_ms = server_now(s);
    memmove(c->in, c->in + head + body, c->in_len - head - body);
    c->in_len -= head + body;
    pthread_mutex_lock(&s->lock);
    s->reqs = (server_req **)server_grow(s->reqs, s->n_reqs, &s->cap_reqs,
                                         sizeof *s->reqs);
    s->reqs[s->n_reqs++] = r;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    server_answer(c, server_take(s));
    return 1;
}

static inline void server_read(server *s, server_conn *c)
{
    char buf[16384];

    while (c->fd >= 0 && !c->eof) {
        ssize_t k = recv(c->fd, buf, sizeof buf, 0);

        if (k > 0 && c->state != SERVER_DEAF) {
            c->in = (char *)server_grow(c->in, c->in_len + (size_t)k,
                                        &c->in_cap, 1);
            memcpy(c->in + c->in_len, buf, (size_t)k);
            c->in_len += (size_t)k;
        } else if (k == 0) {
            c->eof = 1;
            server_mark(s, c, SERVER_FIN);
        } else if (k < 0 && errno != EINTR) {
            if (errno == EAGAIN || errno == EWOULDBLOCK) return;
            server_mark(s, c, SERVER_GOT_RST);
            server_drop(s, c, 0);
        }
    }
}

/* Goes on with a connection as far as it can. */
static inline void server_serve(server *s, server_conn *c)
{
    do {
        if (c->fd >= 0 && c->state == SERVER_WRITING) server_write(s, c);
    } while (c->fd >= 0 && c->state == SERVER_READING && server_parse(s, c));
    if (c->fd >= 0 && c->eof && c->state != SERVER_WRITING)
        server_drop(s, c, 0);
}

static inline void server_accept(server *s)
{
    for (;;) {
        int one = 1, fd = accept(s->listener, NULL, NULL);
        server_conn *c;

        if (fd < 0 && (errno == EINTR || errno == ECONNABORTED)) continue;
        if (fd < 0) {
            /* No descriptors: until one is closed. */
            if (errno == EMFILE || errno == ENFILE) s->deaf_listener = 1;
            return;
        }
        server_fd_flags(fd);
        if (!s->path)
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        c = (server_conn *)calloc(1, sizeof *c);
        if (!c) abort();
        c->fd = fd;
        pthread_mutex_lock(&s->lock);
        c->number = s->n_conns;
        s->conns = (server_conn **)server_grow(
            s->conns, s->n_conns, &s->cap_conns, sizeof *s->conns);
        s->conns[s->n_conns++] = c;
        pthread_cond_broadcast(&s->changed);
        pthread_mutex_unlock(&s->lock);
        s->live = (server_conn **)server_grow(s->live, s->n_live,
                                              &s->cap_live, sizeof *s->live);
        s->live[s->n_live++] = c;
        if (server_at_accept(&s->scripts[s->next_script])) {
            server_answer(c, server_take(s));
            server_serve(s, c);
        }
    }
}

static inline void *server_main(void *arg)
{
    server *s = (server *)arg;

    for (;;) {
        size_t i, n = 2, kept = 0;
        long now = server_now(s), wait = SERVER_LIFE_MS - now;
        int stop;

        if (wait <= 0) break;
        s->fds = (struct pollfd *)server_grow(s->fds, s->n_live + 2,
                                              &s->cap_fds, sizeof *s->fds);
        s->fds[0].fd = s->wake[0];
        s->fds[0].events = POLLIN;
        s->fds[1].fd = s->deaf_listener ? -1 : s->listener;
        s->fds[1].events = POLLIN;
        for (i = 0; i < s->n_live; i++) {
            server_conn *c = s->live[i];

            s->fds[n].fd = c->fd;
            s->fds[n].events = (short)((c->eof ? 0 : POLLIN) |
                                       (c->want_write ? POLLOUT : 0));
            n++;
            if (c->state == SERVER_WRITING && c->armed && c->due > 0 &&
                c->due - now < wait)
                wait = c->due > now ? c->due - now : 0;
        }
        if (poll(s->fds, (nfds_t)n, (int)wait) < 0 && errno != EINTR) break;
        if (s->fds[0].revents) {
            char drain[64];
            while (read(s->wake[0], drain, sizeof drain) > 0)
                ;
        }
        pthread_mutex_lock(&s->lock);
        stop = s->stop;
        pthread_mutex_unlock(&s->lock);
        if (stop) break;
        for (i = 0; i < n - 2; i++) {
            server_conn *c = s->live[i];
            short got = s->fds[i + 2].revents;

            if (got && !c->eof) server_read(s, c);
            else if (got & (POLLERR | POLLHUP)) server_drop(s, c, 0);
            if (c->fd >= 0) server_serve(s, c);
        }
        if (s->fds[1].revents) server_accept(s);
        for (i = 0; i < s->n_live; i++)
            if (s->live[i]->fd >= 0) s->live[kept++] = s->live[i];
        s->n_live = kept;
    }
    for (size_t i = 0; i < s->n_live; i++) server_drop(s, s->live[i], 0);
    close(s->listener);
    pthread_mutex_lock(&s->lock);
    s->ended = 1;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

/* Waits under the lock for a change; 0: the time is up. */
static inline int server_wait(server *s, const struct timespec *until)
{
    return !s->ended &&
           pthread_cond_timedwait(&s->changed, &s->lock, until) == 0;
}

static inline struct timespec server_until(void)
{
    struct timespec t;

    clock_gettime(CLOCK_REALTIME, &t);
    t.tv_sec += SERVER_WAIT_MS / 1000;
    return t;
}

static inline int server_wait_count(server *s, const size_t *count, size_t n)
{
    struct timespec until = server_until();
    int ok;

    if (!s) return 0;
    pthread_mutex_lock(&s->lock);
    while (*count < n && server_wait(s, &until))
        ;
    ok = *count >= n;
    pthread_mutex_unlock(&s->lock);
    return ok;
}

static inline size_t server_get(server *s, const size_t *count)
{
    size_t n;

    pthread_mutex_lock(&s->lock);
    n = *count;
    pthread_mutex_unlock(&s->lock);
    return n;
}

static inline void server_free(server *s)
{
    for (size_t i = 0; i < s->n_reqs; i++) {
        free((void *)s->reqs[i]->head);
        free((void *)s->reqs[i]->body);
        free(s->reqs[i]);
    }
    for (size_t i = 0; i < s->n_conns; i++) free(s->conns[i]);
    for (size_t i = 0; i < s->n_scripts; i++) {
        free((void *)s->scripts[i].bytes);
        free((void *)s->scripts[i].segments);
    }
    if (s->path) unlink(s->path);
    if (s->wake[0] >= 0) close(s->wake[0]);
    if (s->wake[1] >= 0) close(s->wake[1]);
    pthread_mutex_destroy(&s->lock);
    pthread_cond_destroy(&s->changed);
    free(s->reqs);
    free(s->conns);
    free(s->scripts);
    free(s->live);
    free(s->fds);
    free(s->path);
    free(s);
}

static inline int server_listen(server *s, const char *path, int port)
{
    int one = 1;

    if (path) {
        struct sockaddr_un a;

        memset(&a, 0, sizeof a);
        a.sun_family = AF_UNIX;
        if (strlen(path) >= sizeof a.sun_path) return -1;
        strcpy(a.sun_path, path);
        s->path = (char *)server_copy(path, strlen(path));
        unlink(path);
        snprintf(s->base, sizeof s->base, "unix:%s:/v1", path);
        s->listener = socket(AF_UNIX, SOCK_STREAM, 0);
        if (s->listener < 0 ||
            bind(s->listener, (struct sockaddr *)&a, sizeof a) != 0)
            return -1;
    } else {
        struct sockaddr_in a;
        socklen_t len = sizeof a;

        memset(&a, 0, sizeof a);
        a.sin_family = AF_INET;
        a.sin_port = htons((uint16_t)port);
        a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        s->listener = socket(AF_INET, SOCK_STREAM, 0);
        if (s->listener < 0) return -1;
        if (port)
            setsockopt(s->listener, SOL_SOCKET, SO_REUSEADDR, &one,
                       sizeof one);
        if (bind(s->listener, (struct sockaddr *)&a, sizeof a) != 0 ||
            getsockname(s->listener, (struct sockaddr *)&a, &len) != 0)
            return -1;
        s->port = ntohs(a.sin_port);
        snprintf(s->base, sizeof s->base, "http://127.0.0.1:%d/v1", s->port);
    }
    server_fd_flags(s->listener);
    return listen(s->listener, 1024);
}

/* ---- what tests call --------------------------------------------------- */

/* path NULL: on 127.0.0.1 at port, 0 for any free one. NULL: it could not,
 * which is told on stderr. */
static inline server *server_start_at(const char *path, int port,
                                      const server_script *scripts, size_t n)
{
    server *s = (server *)calloc(1, sizeof *s);

    if (!s || !n) abort();
    s->listener = s->wake[0] = s->wake[1] = -1;
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->changed, NULL);
    clock_gettime(CLOCK_MONOTONIC, &s->began);
    s->n_scripts = n;
    s->scripts = (server_script *)calloc(n, sizeof *scripts);
    if (!s->scripts) abort();
    for (size_t i = 0; i < n; i++) {
        server_script *p = &s->scripts[i];

        *p = scripts[i];
        if (!p->len && p->bytes) p->len = strlen(p->bytes);
        p->bytes = (const char *)server_copy(p->bytes, p->len);
        p->segments = (const server_segment *)server_copy(
            p->segments, p->n_segments * sizeof *p->segments);
    }
    if (pipe(s->wake) == 0) {
        server_fd_flags(s->wake[0]);
        server_fd_flags(s->wake[1]);
        if (server_listen(s, path, port) == 0 &&
            pthread_create(&s->thread, NULL, server_main, s) == 0)
            return s;
    }
    perror("server_start");
    if (s->listener >= 0) close(s->listener);
    server_free(s);
    return NULL;
}

static inline server *server_start(const server_script *scripts, size_t n)
{
    return server_start_at(NULL, 0, scripts, n);
}

static inline server *server_start_unix(const char *path,
                                        const server_script *scripts,
                                        size_t n)
{
    return server_start_at(path, 0, scripts, n);
}

/* Closes all connections, ends the thread and frees everything. */
static inline void server_stop(server *s)
{
    if (!s) return;
    pthread_mutex_lock(&s->lock);
    s->stop = 1;
    pthread_mutex_unlock(&s->lock);
    if (write(s->wake[1], "", 1) < 0) perror("server_stop");
    pthread_join(s->thread, NULL);
    server_free(s);
}

/* The port; 0 on a unix socket. */
static inline int server_port(const server *s)
{
    return s->port;
}

/* For llmcb_chat_desc.base_url. */
static inline const char *server_base(const server *s)
{
    return s->base;
}

/* How many requests have been read whole. */
static inline size_t server_requests(server *s)
{
    return server_get(s, &s->n_reqs);
}

/* Request i in the order of arrival; NULL: there are not so many. */
static inline const server_req *server_request(server *s, size_t i)
{
    const server_req *r;

    pthread_mutex_lock(&s->lock);
    r = i < s->n_reqs ? s->reqs[i] : NULL;
    pthread_mutex_unlock(&s->lock);
    return r;
}

/* Copies a header field's value to out; NULL: there is none. */
static inline const char *server_header(const server_req *r, const char *name,
                                        char *out, size_t cap)
{
    size_t len = 0;
    const char *v = r ? server_field(r->head, name, &len) : NULL;

    if (!v || !cap) return NULL;
    if (len >= cap) len = cap - 1;
    memcpy(out, v, len);
    out[len] = 0;
    return out;
}

/* How many connections have been accepted. */
static inline size_t server_connections(server *s)
{
    return server_get(s, &s->n_conns);
}

/* How a connection ended so far. */
static inline server_closed server_is_closed(server *s, size_t conn)
{
    server_closed how = SERVER_OPEN;

    pthread_mutex_lock(&s->lock);
    if (conn < s->n_conns) how = s->conns[conn]->closed;
    pthread_mutex_unlock(&s->lock);
    return how;
}

/* Waits for the end of connection conn, 0 the first, which need not be there
 * yet. SERVER_OPEN: it did not end in time. */
static inline server_closed server_wait_closed(server *s, size_t conn)
{
    struct timespec until = server_until();
    server_closed how = SERVER_OPEN;

    if (!s) return how;
    pthread_mutex_lock(&s->lock);
    do {
        if (conn < s->n_conns) how = s->conns[conn]->closed;
    } while (how == SERVER_OPEN && server_wait(s, &until));
    if (conn < s->n_conns) how = s->conns[conn]->closed;
    pthread_mutex_unlock(&s->lock);
    return how;
}

/* Wait until there were n of it since the start; 0: not in time. */
static inline int server_wait_requests(server *s, size_t n)
{
    return server_wait_count(s, s ? &s->n_reqs : NULL, n);
}

static inline int server_wait_connections(server *s, size_t n)
{
    return server_wait_count(s, s ? &s->n_conns : NULL, n);
}

/* Scripts sent to their end. */
static inline int server_wait_sent(server *s, size_t n)
{
    return server_wait_count(s, s ? &s->sent : NULL, n);
}

/* SERVER_HOLD borders reached. */
static inline int server_wait_held(server *s, size_t n)
{
    return server_wait_count(s, s ? &s->held : NULL, n);
}

/* Lets one SERVER_HOLD border pass, the present or the next one. */
static inline void server_go(server *s)
{
    pthread_mutex_lock(&s->lock);
    s->go++;
    pthread_mutex_unlock(&s->lock);
    if (write(s->wake[1], "", 1) < 0 && errno != EAGAIN) perror("server_go");
}

/* Bytes that the system has taken for connection conn. */
static inline size_t server_sent_bytes(server *s, size_t conn)
{
    size_t n = 0;

    pthread_mutex_lock(&s->lock);
    if (conn < s->n_conns) n = s->conns[conn]->sent;
    pthread_mutex_unlock(&s->lock);
    return n;
}

/* ---- recordings --------------------------------------------------------- */

static inline char *server_file(const char *path, size_t *len)
{
    FILE *f = fopen(path, "rb");
    char *p = NULL;
    size_t cap = 0, k;

    *len = 0;
    if (!f) return NULL;
    do {
        p = (char *)server_grow(p, *len + 65536, &cap, 1);
        k = fread(p + *len, 1, 65536, f);
        *len += k;
    } while (k);
    fclose(f);
    p[*len] = 0;
    return p;
}

/* Reads NAME.http and NAME.segments.json; bytes NULL: there is no such file.
 * To be freed with server_unload. */
static inline server_script server_load(const char *path)
{
    server_script p;
    size_t base = strlen(path), len, cap = 0;
    char *json, *name = (char *)malloc(base + 32), *at;
    server_segment *segs = NULL;

    memset(&p, 0, sizeof p);
    if (!name) abort();
    p.bytes = server_file(path, &p.len);
    if (base > 5 && strcmp(path + base - 5, ".http") == 0) base -= 5;
    snprintf(name, base + 32, "%.*s.segments.json", (int)base, path);
    json = p.bytes ? server_file(name, &len) : NULL;
    free(name);
    if (!json) return p;
    at = strstr(json, "\"end\":");
    if (at) {
        at += 6 + strspn(at + 6, " ");
        if (strncmp(at, "\"close", 6) == 0) p.end = SERVER_CLOSE;
        if (strncmp(at, "\"rst", 4) == 0) p.end = SERVER_RST;
        if (strncmp(at, "\"reset", 6) == 0) p.end = SERVER_RST;
        if (strncmp(at, "\"stall", 6) == 0) p.end = SERVER_STALL;
        if (strncmp(at, "\"refuse", 7) == 0) p.end = SERVER_ACCEPT_RST;
    }
    at = strstr(json, "\"segments\":");
    if (at) at = strchr(at, '[');
    while (at) {
        at += 1 + strspn(at + 1, " \r\n\t,");
        if (*at != '[') break;
        segs = (server_segment *)server_grow(segs, p.n_segments, &cap,
                                             sizeof *segs);
        segs[p.n_segments].offset = (size_t)strtoul(at + 1, &at, 10);
        at += strspn(at, " ,");
        segs[p.n_segments].delay_ms = strtol(at, &at, 10);
        p.n_segments++;
        at = strchr(at, ']');
    }
    p.segments = segs;
    free(json);
    return p;
}

static inline void server_unload(server_script *p)
{
    free((void *)p->bytes);
    free((void *)p->segments);
    memset(p, 0, sizeof *p);
}

/* Reads NAME.http, NAME-2.http ...; how many there are, cap at most. */
static inline size_t server_load_all(const char *path, server_script *out,
                                     size_t cap)
{
    size_t n = 0, base = strlen(path);
    char *name = (char *)malloc(base + 32);

    if (!name) abort();
    if (base > 5 && strcmp(path + base - 5, ".http") == 0) base -= 5;
    for (; n < cap; n++) {
        if (n == 0) snprintf(name, base + 32, "%s", path);
        else
            snprintf(name, base + 32, "%.*s-%d.http", (int)base, path,
                     (int)n + 1);
        out[n] = server_load(name);
        if (!out[n].bytes) break;
    }
    free(name);
    if (!n) fprintf(stderr, "server: cannot read %s\n", path);
    return n;
}

/* server_start with what server_load_all finds. */
static inline server *server_start_fixture(const char *path)
{
    server_script p[16];
    size_t n = server_load_all(path, p, 16);
    server *s = n ? server_start(p, n) : NULL;

    for (size_t i = 0; i < n; i++) server_unload(&p[i]);
    return s;
}
#endif

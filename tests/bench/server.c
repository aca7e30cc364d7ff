/* The load server: answers POST /v1/chat/completions on the loopback with a
 * stream of max_tokens events, as fast as the socket takes them or at a pace.
 *
 *     server [-e EVENTS] [-r RATE] [-o] [-m N] [-l SECONDS]   prints "port N"
 *     server -g TOKENS [-o] [-m N]                            prints a response
 *
 * -e  events a write (1)
 * -r  tokens a second of each stream (0: as fast as it goes)
 * -o  events of random length (see gen.h)
 * -m  tokens are 0 text, 1 reasoning, 2 the arguments of a tool call
 * -l  ends after so many seconds (600), or when its standard input closes
 *
 * All is rendered before the first request: serving a stream is sending
 * stretches of one piece of memory, so that the server is never what is
 * measured. One epoll, one thread. */
#include "gen.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_FD 65536
#define MAX_REQUEST 65536
#define SLOTS 8192   /* of the timing wheel, a millisecond each */
#define TURN_SENDS 4 /* of one stream, before it is another's turn */

enum { AT_REQUEST, AT_HEAD, AT_TOKENS, AT_TAIL };

typedef struct conn {
    struct conn *prev, *next; /* in the list of the ready, or a slot */
    char *request;            /* a part of one, if it came in parts */
    uint64_t due;             /* microseconds; of a paced stream */
    uint32_t request_len;
    uint32_t place, seed;     /* in the ring */
    uint32_t left, tokens;
    uint32_t sent;            /* bytes of the write that is under way */
    int fd;
    uint8_t state, usage, listed, blocked;
} conn;

static gen g;
static conn *conns[MAX_FD];
static conn ready = { .prev = &ready, .next = &ready };
static conn slots[SLOTS];
static uint64_t now_us, wheel_ms;
static unsigned events = 1;
static uint64_t period_us; /* of a write */
static int epoll_fd;
static size_t n_timed;

static uint64_t clock_us(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000 + (uint64_t)ts.tv_nsec / 1000;
}

static void unlist(conn *c)
{
    if (!c->listed) return;
    if (c->listed == 2) n_timed--;
    c->prev->next = c->next;
    c->next->prev = c->prev;
    c->listed = 0;
}

static void put(conn *list, conn *c, int what)
{
    unlist(c);
    c->prev = list->prev;
    c->next = list;
    list->prev->next = c;
    list->prev = c;
    c->listed = (uint8_t)what;
    if (what == 2) n_timed++;
}

static void drop(conn *c)
{
    unlist(c);
    close(c->fd);
    conns[c->fd] = NULL;
    free(c->request);
    free(c);
}

/* The number behind a member's name, or 0. */
static uint32_t member(const char *body, const char *name)
{
    const char *p = strstr(body, name);

    return p ? (uint32_t)strtoul(p + strlen(name), NULL, 10) : 0;
}

/* Sends the rest of one write. 1: it is out, 0: no room, -1: gone. */
static int push(conn *c, const char *bytes, size_t len)
{
    ssize_t n = send(c->fd, bytes + c->sent, len - c->sent, MSG_NOSIGNAL);

    if (n < 0) {
        if (errno != EAGAIN && errno != EINTR) return -1;
        c->blocked = 1;
        return 0;
    }
    c->sent += (uint32_t)n;
    if (c->sent < len) {
        c->blocked = 1;
        return 0;
    }
    c->sent = 0;
    return 1;
}

/* One write of tokens. The place moves on when all of it is out. */
static int push_tokens(conn *c)
{
    uint32_t n = c->left < events ? c->left : events;
    uint32_t at = c->place % GEN_RING;
    uint32_t i;
    int r;

    for (i = at; i < at + n; i++)
        gen_stamp(g.bytes + g.at[i], c->seed);
    r = push(c, g.bytes + g.at[at], g.at[at + n] - g.at[at]);
    if (r <= 0) return r;
    c->place += n;
    c->left -= n;
    if (!c->left) c->state = AT_TAIL;
    return 1;
}

static void serve(conn *c)
{
    char tail[1024];
    int i, r = 1;

    c->blocked = 0;
    for (i = 0; i < TURN_SENDS && r > 0 && c->state != AT_REQUEST; i++) {
        if (c->state == AT_HEAD) {
            gen_stamp(g.head + sizeof GEN_HEAD - 1, c->seed);
            r = push(c, g.head, g.head_len);
            if (r > 0) c->state = c->left ? AT_TOKENS : AT_TAIL;
            if (r > 0 && period_us) { /* a phase of its own */
                c->due = now_us +
                         (c->seed * 2654435761u) % (uint32_t)period_us;
                break;
            }
        } else if (c->state == AT_TOKENS) {
            r = push_tokens(c);
            if (r > 0 && period_us && c->state == AT_TOKENS) {
                c->due += period_us;
                break;
            }
        } else {
            r = push(c, tail,
                     gen_tail(&g, tail, sizeof tail, c->seed, c->tokens,
                              c->usage));
            if (r > 0) c->state = AT_REQUEST;
        }
    }
    if (r < 0) {
        drop(c);
    } else if (c->state == AT_REQUEST || c->blocked) {
        unlist(c);
    } else if (period_us && c->state == AT_TOKENS) {
        if (c->due < now_us) c->due = now_us; /* late: no burst to catch up */
        put(&slots[c->due / 1000 % SLOTS], c, 2);
    } else {
        put(&ready, c, 1);
    }
}

/* Whether there is a whole request; then it is answered. */
static int take_request(conn *c, char *text, size_t len)
{
    static const char field[] = "content-length:";
    char *body, *p;
    size_t size = 0;

    text[len] = '\0';
    body = strstr(text, "\r\n\r\n");
    if (!body) return 0;
    for (p = text; p < body; p++)
        if (*p == '\n' && strncasecmp(p + 1, field, sizeof field - 1) == 0)
            size = strtoul(p + sizeof field, NULL, 10);
    body += 4;
    if ((size_t)(text + len - body) < size) return 0;
    c->tokens = member(body, "\"max_tokens\":");
    if (!c->tokens) c->tokens = member(body, "\"max_completion_tokens\":");
    c->seed = member(body, "\"seed\":");
    c->usage = strstr(body, "\"include_usage\":true") != NULL;
    c->place = gen_start(c->seed);
    c->left = c->tokens;
    c->state = AT_HEAD;
    c->sent = 0;
    free(c->request);
    c->request = NULL;
    c->request_len = 0;
    serve(c);
    return 1;
}

static void receive(conn *c)
{
    static char buf[MAX_REQUEST + 1];
    size_t had = c->request_len;
    ssize_t n;

    if (had) memcpy(buf, c->request, had);
    n = recv(c->fd, buf + had, MAX_REQUEST - had, 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (n <= 0 || had + (size_t)n == MAX_REQUEST) {
        drop(c);
        return;
    }
    if (c->state != AT_REQUEST) return; /* nobody pipelines here */
    if (take_request(c, buf, had + (size_t)n)) return;
    c->request_len = (uint32_t)(had + (size_t)n);
    c->request = (char *)realloc(c->request, c->request_len);
    if (c->request) memcpy(c->request, buf, c->request_len);
    else drop(c);
}

static void accept_all(int listener)
{
    int fd, one = 1, i;

    for (i = 0; i < 512; i++) {
        struct epoll_event ev = { .events = EPOLLIN | EPOLLOUT | EPOLLET };
        conn *c;
        fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) return;
        c = fd < MAX_FD ? (conn *)calloc(1, sizeof *c) : NULL;
        if (!c) {
            close(fd);
            continue;
        }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        c->fd = fd;
        conns[fd] = c;
        ev.data.fd = fd;
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &ev);
        receive(c); /* the request is often there already */
    }
}

/* The paced streams whose time has come. */
static void turn_wheel(void)
{
    uint64_t to = now_us / 1000;

    if (to > wheel_ms + SLOTS) wheel_ms = to - SLOTS;
    for (; wheel_ms < to; wheel_ms++) {
        conn *slot = &slots[wheel_ms % SLOTS], *c, *next;
        for (c = slot->next; c != slot; c = next) {
            next = c->next;
            if (c->due / 1000 <= wheel_ms) serve(c);
        }
    }
}

static int listen_on_loopback(void)
{
    struct sockaddr_in a = { .sin_family = AF_INET };
    socklen_t len = sizeof a;
    struct epoll_event ev = { .events = EPOLLIN };
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);

    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (fd < 0 || bind(fd, (struct sockaddr *)&a, sizeof a) != 0 ||
        listen(fd, 16384) != 0 ||
        getsockname(fd, (struct sockaddr *)&a, &len) != 0) {
        perror("server");
        exit(2);
    }
    ev.data.fd = fd;
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &ev);
    printf("port %u\n", ntohs(a.sin_port));
    fflush(stdout);
    return fd;
}

static void run(uint64_t life_us)
{
    struct epoll_event ev[1024];
    int i, n, timeout, listener;
    uint64_t end;

    epoll_fd = epoll_create1(0);
    listener = listen_on_loopback();
    ev[0].events = EPOLLIN;
    ev[0].data.fd = 0;
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, 0, ev); /* fails for /dev/null: fine */
    for (i = 0; i < SLOTS; i++) slots[i].prev = slots[i].next = &slots[i];
    now_us = clock_us();
    wheel_ms = now_us / 1000;
    end = now_us + life_us;
    while (now_us < end) {
        conn *c, *last;
        timeout = ready.next != &ready ? 0 : n_timed ? 1 : 1000;
        n = epoll_wait(epoll_fd, ev, 1024, timeout);
        now_us = clock_us();
        for (i = 0; i < n; i++) {
            int fd = ev[i].data.fd;
            if (fd == listener) {
                accept_all(listener);
            } else if (fd == 0) {
                char junk[64];
                if (read(0, junk, sizeof junk) <= 0) return;
            } else if ((c = conns[fd]) != NULL) {
                if (c->blocked && ev[i].events & EPOLLOUT) serve(c);
                c = conns[fd];
                if (c && ev[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))
                    receive(c);
            }
        }
        turn_wheel();
        last = ready.prev;
        while (ready.next != &ready) { /* each once */
            c = ready.next;
            serve(c);
            if (c == last) break;
        }
    }
}

/* One response on standard output, for parsing without a network. */
static void print_response(unsigned tokens)
{
    char tail[1024];
    unsigned i;

    fwrite(g.head, 1, g.head_len, stdout);
    for (i = 0; i < tokens; i++) {
        unsigned k = i % GEN_RING;
        fwrite(g.bytes + g.at[k], 1, g.at[k + 1] - g.at[k], stdout);
    }
    fwrite(tail, 1, gen_tail(&g, tail, sizeof tail, 0, tokens, 1), stdout);
}

int main(int argc, char **argv)
{
    unsigned print = 0, life = 600, rate = 0;
    int opt, obfuscation = 0;
    unsigned member = GEN_CONTENT;
    struct rlimit r;

    while ((opt = getopt(argc, argv, "e:r:l:g:om:")) != -1) {
        unsigned v = optarg ? (unsigned)strtoul(optarg, NULL, 10) : 0;
        if (opt == 'e') events = v;
        else if (opt == 'r') rate = v;
        else if (opt == 'l') life = v;
        else if (opt == 'g') print = v;
        else if (opt == 'o') obfuscation = 1;
        else if (opt == 'm') member = v;
        else return 2;
    }
    if (!events || events > GEN_MAX_WRITE || member > GEN_TOOL) return 2;
    if (rate) period_us = 1000000ull * events / rate;
    gen_init(&g, obfuscation, member);
    if (print) {
        print_response(print);
        return 0;
    }
    if (getrlimit(RLIMIT_NOFILE, &r) == 0) {
        r.rlim_cur = r.rlim_max;
        setrlimit(RLIMIT_NOFILE, &r);
    }
    run(life * 1000000ull);
    return 0;
}

/* The header's own client.
 *
 *     client -p PORT -n STREAMS -t TOKENS [-x socket|curl]
 *            [-H inline|sync|async|none|lock] [-k HANDLERS] [-u] [-S MS]
 *     client -f FILE -r ROUNDS [-H ...] [-k ...]
 *
 * Asks 127.0.0.1:PORT for STREAMS streams at once, each with a seed of its
 * own, and checks that every handler was called for every token with text.
 *
 * -H  what the handlers are; lock: sync with LLMCB_AWAIT_EACH
 * -k  handlers a stream; all streams share them
 * -u  handlers of its own for each stream, which keep the text themselves;
 *     it must be the text of the result
 * -S  stream 0 has a handler that sleeps so many milliseconds for each of its
 *     first 200 tokens; part_wall_s is when all others were done
 * -f  parses the bytes of a recorded response, handed over in pieces of a
 *     read's size, ROUNDS times; no network
 *
 * All streams are calls of one chat, each with its seed as an extra member.
 *
 * It is built twice: libcurl and what that loads weigh 6 MB, so the program
 * for plain sockets has none, and hands -x curl to client_curl beside it. */
#include "bench.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>

/* Reads, waits and bytes are counted where the header makes its system
 * calls; these names come back as macros from LLMCBI_SYS. */
static inline ssize_t counted_recv(int fd, void *p, size_t n, int flags)
{
    ssize_t got = recv(fd, p, n, flags);

    bench.reads++;
    if (got > 0) bench.wire += (uint64_t)got;
    return got;
}

static inline int counted_wait(int fd, struct epoll_event *ev, int n, int ms)
{
    bench.waits++;
    return epoll_wait(fd, ev, n, ms);
}

#define recv(a, b, c, d) counted_recv(a, b, c, d)
#define epoll_wait(a, b, c, d) counted_wait(a, b, c, d)
#define LLMCB_IMPLEMENTATION
#include "llmcb.h"
#undef recv
#undef epoll_wait

#define SLICE 256 /* calls that are made between two turns */
#define PIECE 65536

typedef struct seen {
    uint64_t tokens, bytes;
    uint64_t quiet; /* so many tokens are only counted */
    bool marks;     /* it tells bench_progress */
    char *text; /* -u */
    size_t len, cap;
    unsigned sleep_ms, naps;
} seen;

static struct {
    int port;
    unsigned streams, tokens, rounds, n_handlers, sleep_ms;
    const char *kind, *transport, *file;
    bool own;
} opts = { .streams = 1, .tokens = 100, .rounds = 1, .n_handlers = 1,
           .kind = "inline", .transport = "socket" };

static uint64_t live_bytes;

/* -- memory, as the library asks for it */

static void *counting_resize(void *user, void *ptr, size_t old, size_t size)
{
    uint64_t live;

    (void)user;
    live = __sync_add_and_fetch(&live_bytes, (uint64_t)size - old);
    if (live > bench.peak_bytes) bench.peak_bytes = live;
    if (!size) {
        free(ptr);
        return NULL;
    }
    __sync_add_and_fetch(&bench.allocs, 1);
    return realloc(ptr, size);
}

#ifndef LLMCB_NO_CURL
/* libcurl's own, which count as the transport's. */
static void *curl_malloc(size_t n)
{
    bench.allocs++;
    return malloc(n);
}

static void *curl_realloc(void *p, size_t n)
{
    bench.allocs++;
    return realloc(p, n);
}

static void *curl_calloc(size_t n, size_t size)
{
    bench.allocs++;
    return calloc(n, size);
}

static char *curl_strdup(const char *s)
{
    char *p = (char *)curl_malloc(strlen(s) + 1);

    return p ? strcpy(p, s) : NULL;
}
#endif

/* -- handlers */

__attribute__((noinline)) static void see_more(seen *s, llmcb_str text)
{
    if (s->marks) {
        bench_progress(s->tokens);
        s->quiet = bench.marks[bench.n_marks].at - 1;
    }
    if (opts.own) {
        if (s->len + text.len > s->cap) {
            s->cap = 2 * (s->len + text.len);
            s->text = (char *)realloc(s->text, s->cap);
            if (!s->text) exit(2);
        }
        memcpy(s->text + s->len, text.ptr, text.len);
        s->len += text.len;
    }
    if (s->sleep_ms && s->naps < 200) {
        s->naps++;
        usleep(s->sleep_ms * 1000);
    }
}

static void see(seen *s, llmcb_str text)
{
    if (!text.len) return;
    s->bytes += text.len;
    if (++s->tokens > s->quiet) see_more(s, text);
}

static int on_token(llmcb_handler *h, const llmcb_event *ev)
{
    see((seen *)h->user, ev->token->text);
    return 0;
}

static llmcb_step on_token_async(llmcb_task *t, llmcb_handler *h,
                                 const llmcb_event *ev)
{
    LLMCB_BEGIN(t);
    see((seen *)h->user, ev->token->text);
    LLMCB_END(t);
}

static unsigned sleeper_others; /* streams that are not done, but for 0 */

static int on_end_inline(llmcb_handler *h, const llmcb_event *ev)
{
    (void)h;
    (void)ev;
    if (--sleeper_others == 0)
        bench.first_wall = bench_wall() - bench.wall0;
    return 0;
}

static llmcb_handler end_watch = { .sync = { .on_llm_end = on_end_inline,
                                             .on_llm_error = on_end_inline },
                                   .flags = LLMCB_INLINE };

static void handler_init(llmcb_handler *h, seen *s)
{
    memset(h, 0, sizeof *h);
    h->user = s;
    s->quiet = opts.own || opts.sleep_ms ? 0 : UINT64_MAX;
    if (strcmp(opts.kind, "async") == 0)
        h->async.on_llm_new_token = on_token_async;
    else
        h->sync.on_llm_new_token = on_token;
    if (strcmp(opts.kind, "inline") == 0) h->flags = LLMCB_INLINE;
    if (strcmp(opts.kind, "lock") == 0) h->flags = LLMCB_AWAIT_EACH;
}

/* -- what came of it */

static void check_own(const llmcb_result *r, const seen *s, size_t n)
{
    llmcb_str text = r->n_generations ? r->generations[0].text
                                      : (llmcb_str){ "", 0 };
    size_t i;

    for (i = 0; i < n; i++) {
        if (s[i].len != text.len ||
            (text.len && memcmp(s[i].text, text.ptr, text.len) != 0))
            bench.errors++;
        free(s[i].text);
    }
}

/* Adds a stream's result; returns the tokens that the server counted. */
static uint64_t take_result(llmcb_op *op)
{
    const llmcb_result *r = llmcb_op_result(op);

    if (llmcb_op_code(op) != LLMCB_OK) {
        if (!bench.errors++)
            fprintf(stderr, "client: %s\n", llmcb_op_error(op)->message);
    }
    if (r->n_generations)
        bench_add_text(r->generations[0].text.ptr,
                       r->generations[0].text.len);
    return r->usage.known ? (uint64_t)r->usage.output_tokens : opts.tokens;
}

/* All handlers of all streams must have seen the same. */
static void take_seen(const seen *s, size_t n, size_t every, uint64_t counted)
{
    uint64_t tokens = 0, bytes = 0;
    size_t i, k;

    bench.tokens = counted;
    for (k = 0; k < every; k++) {
        tokens = bytes = 0;
        for (i = k; i < n; i += every) {
            tokens += s[i].tokens;
            bytes += s[i].bytes;
        }
        if (tokens != counted || bytes != bench.bytes) bench.errors++;
    }
}

static const llmcb_message question = { .role = LLMCB_USER,
                                        .content = "Tell me a joke" };

/* -- many streams */

static void run_network(llmcb_loop *loop)
{
    bool none = strcmp(opts.kind, "none") == 0;
    size_t k = none ? 0 : opts.n_handlers, n = opts.streams, i, j;
    size_t sets = opts.own ? n : opts.sleep_ms ? 2 : 1;
    seen *s = (seen *)calloc(sets * k + 1, sizeof *s);
    llmcb_handler *h = (llmcb_handler *)calloc(sets * k + 1, sizeof *h);
    llmcb_op **ops = (llmcb_op **)calloc(n, sizeof *ops);
    llmcb_transport *tr = strcmp(opts.transport, "curl") == 0
                              ? llmcb_curl_transport(loop)
                              : llmcb_socket_transport(loop);
    uint64_t counted = 0;
    char url[64];
    llmcb_chat_desc desc = { .base_url = url, .api_key = "",
                             .streaming = true,
                             .max_tokens = (int)opts.tokens,
                             .transport = tr, .max_retries = -1 };
    llmcb_chat *chat;

    if (!s || !h || !ops || !tr) {
        fprintf(stderr, "client: no memory, or no such transport\n");
        exit(2);
    }
    for (i = 0; i < sets * k; i++) handler_init(&h[i], &s[i]);
    if (k && !opts.own) {
        s[sets > 1 ? k : 0].marks = true;
        s[sets > 1 ? k : 0].quiet = 0;
    }
    if (sets == 2) s[0].sleep_ms = opts.sleep_ms;
    sleeper_others = opts.sleep_ms ? opts.streams - 1 : 0;
    snprintf(url, sizeof url, "http://127.0.0.1:%d/v1", opts.port);
    chat = llmcb_chat_new(loop, &desc);
    for (i = 0; i < n; i++) {
        llmcb_handler *list[66];
        char extra[32];
        llmcb_config config = { .callbacks = list, .n_callbacks = k,
                                .extra = extra };
        size_t set = opts.own ? i : opts.sleep_ms && i ? 1 : 0;
        snprintf(extra, sizeof extra, "{\"seed\":%u}", (unsigned)i);
        for (j = 0; j < k; j++) list[j] = &h[set * k + j];
        if (opts.sleep_ms && i) list[config.n_callbacks++] = &end_watch;
        ops[i] = llmcb_chat_generate(chat, &question, 1, &config);
        if (i % SLICE == SLICE - 1) llmcb_loop_run_once(loop, 0);
    }
    llmcb_loop_run(loop);
    for (i = 0; i < n; i++) {
        counted += take_result(ops[i]);
        if (opts.own) check_own(llmcb_op_result(ops[i]), &s[i * k], k);
        llmcb_op_free(ops[i]);
    }
    llmcb_chat_free(chat);
    take_seen(s, sets * k, k, counted);
    free(s);
    free(h);
    free(ops);
}

/* -- recorded bytes */

static char *read_all(const char *path, size_t *len)
{
    FILE *f = fopen(path, "rb");
    char *p = NULL;
    size_t cap = 0, n;

    *len = 0;
    if (!f) {
        perror(path);
        exit(2);
    }
    do {
        cap += 1 << 20;
        p = (char *)realloc(p, cap);
        if (!p) exit(2);
        n = fread(p + *len, 1, cap - *len, f);
        *len += n;
    } while (*len == cap);
    fclose(f);
    return p;
}

static void run_file(llmcb_loop *loop)
{
    bool none = strcmp(opts.kind, "none") == 0;
    size_t k = none ? 0 : opts.n_handlers, i;
    seen *s = (seen *)calloc(k + 1, sizeof *s);
    llmcb_handler *h = (llmcb_handler *)calloc(k + 1, sizeof *h);
    llmcb_handler *list[64];
    llmcb_recording rec = { .end = LLMCB_REPLAY_CLOSE };
    llmcb_replay_desc replay = { .recordings = &rec, .n_recordings = 1,
                                 .no_delays = true };
    llmcb_chat_desc desc = { .base_url = "http://127.0.0.1/v1",
                             .api_key = "", .streaming = true,
                             .callbacks = list, .n_callbacks = k,
                             .max_retries = -1 };
    llmcb_segment *pieces;
    llmcb_chat *chat;
    uint64_t counted = 0;
    unsigned round;
    char *bytes = read_all(opts.file, &rec.len);

    rec.n_segments = rec.len / PIECE + 1;
    pieces = (llmcb_segment *)calloc(rec.n_segments, sizeof *pieces);
    if (!s || !h || !pieces) exit(2);
    for (i = 0; i < rec.n_segments; i++) pieces[i].offset = i * PIECE;
    for (i = 0; i < k; i++) {
        handler_init(&h[i], &s[i]);
        list[i] = &h[i];
    }
    rec.bytes = bytes;
    rec.segments = pieces;
    desc.transport = llmcb_replay_new(loop, &replay);
    free(bytes);
    chat = llmcb_chat_new(loop, &desc);
    opts.own = false;
    bench_begin(opts.rounds, 0);
    for (round = 0; round < opts.rounds; round++) {
        llmcb_op *op = llmcb_chat_generate(chat, &question, 1, NULL);
        llmcb_op_wait(op);
        bench.wire += rec.len;
        opts.tokens = 0;
        counted += take_result(op);
        llmcb_op_free(op);
    }
    /* a recording need not say how many tokens it has */
    if (k && counted != s[0].tokens) counted = s[0].tokens;
    take_seen(s, k, k, counted);
    llmcb_chat_free(chat);
    free(pieces);
    free(s);
    free(h);
}

static bool options(int argc, char **argv)
{
    int opt;

    while ((opt = getopt(argc, argv, "p:n:t:x:H:k:f:r:uS:")) != -1) {
        unsigned v = optarg ? (unsigned)strtoul(optarg, NULL, 10) : 0;
        switch (opt) {
        case 'p': opts.port = (int)v; break;
        case 'n': opts.streams = v; break;
        case 't': opts.tokens = v; break;
        case 'x': opts.transport = optarg; break;
        case 'H': opts.kind = optarg; break;
        case 'k': opts.n_handlers = v; break;
        case 'f': opts.file = optarg; break;
        case 'r': opts.rounds = v; break;
        case 'u': opts.own = true; break;
        case 'S': opts.sleep_ms = v; break;
        default: return false;
        }
    }
    return (opts.port > 0 || opts.file) && opts.streams && opts.n_handlers &&
           opts.n_handlers <= 64 &&
           strstr("inline sync async none lock", opts.kind) &&
           strstr("socket curl", opts.transport);
}

#ifdef LLMCB_NO_CURL
static int with_curl(char **argv)
{
    char path[4096];

    snprintf(path, sizeof path, "%s_curl", argv[0]);
    execv(path, argv);
    perror(path);
    return 2;
}
#endif

int main(int argc, char **argv)
{
    llmcb_loop_desc desc = { .allocator = { counting_resize, NULL } };
    llmcb_loop *loop;

    if (!options(argc, argv)) {
        fprintf(stderr,
                "usage: %s -p PORT -n STREAMS -t TOKENS [-x socket|curl]\n"
                "       [-H inline|sync|async|none|lock] [-k HANDLERS] [-u] "
                "[-S MS]\n       or -f FILE -r ROUNDS\n", argv[0]);
        return 2;
    }
#ifdef LLMCB_NO_CURL
    if (strcmp(opts.transport, "curl") == 0) return with_curl(argv);
#endif
    bench_begin(opts.streams, opts.tokens);
#ifndef LLMCB_NO_CURL
    if (strcmp(opts.transport, "curl") == 0)
        curl_global_init_mem(CURL_GLOBAL_DEFAULT, curl_malloc, free,
                             curl_realloc, curl_strdup, curl_calloc);
#endif
    loop = llmcb_loop_new(&desc);
    if (opts.file) run_file(loop);
    else run_network(loop);
    llmcb_loop_free(loop);
    if (live_bytes) bench.errors++; /* a leak */
    return bench_end("llmcb");
}

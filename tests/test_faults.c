/* Every fault of sections B to F of the fault catalogue (rows 11 to 95): a
 * server that answers wrongly, on the three transports. The rows are a
 * table; a test is named fault_NNN_NAME_TRANSPORT after its row. What needs
 * more than one answer, or time, is a function further down.
 *
 * After every fault the same is asserted: the code, the tokens that were
 * complete before it in order and before the finish, exactly one finish for
 * every handler and nothing behind it, the partial text in the result, no
 * key and no prompt in any text, a clean request on the same loop, and no
 * memory or descriptor left over. */
#define LLMCB_IMPLEMENTATION
#include "../llmcb.h"
#include "test.h"
#include "server.h"

#define KEY "sk-CANARY-4f1d9b7c2e"
#define PROMPT "canary-prompt-77ab"

/* ---- bytes --------------------------------------------------------------- */

typedef struct bytes {
    char *p;
    size_t len, cap;
} bytes;

static void put(bytes *b, const void *p, size_t len)
{
    b->p = server_grow(b->p, b->len + len, &b->cap, 1);
    if (b->cap <= b->len + len) abort();
    if (len) memcpy(b->p + b->len, p, len);
    b->len += len;
    b->p[b->len] = 0;
}

static void puts_to(bytes *b, const char *s)
{
    put(b, s, strlen(s));
}

static void fill(bytes *b, char c, size_t n)
{
    char block[4096];

    memset(block, c, sizeof block);
    for (; n > sizeof block; n -= sizeof block) put(b, block, sizeof block);
    put(b, block, n);
}

static void put_chunk(bytes *b, const char *p, size_t len)
{
    char size[32];

    snprintf(size, sizeof size, "%lx\r\n", (unsigned long)len);
    puts_to(b, size);
    put(b, p, len);
    puts_to(b, "\r\n");
}

/* ---- what handlers saw --------------------------------------------------- */

typedef struct seen {
    bytes tokens;  /* each ended by a bar, controls as \xNN */
    bytes text;    /* choice 0, as it is */
    bytes partial; /* of the finish event's first generation */
    size_t n_start, n_tokens, n_end, n_error, n_after, n_retry;
    bool bad_seq, complete, sentinel;
    uint64_t seq;
    llmcb_error error;
    int64_t delay[8];
    int status[8], attempt[8];
    size_t tokens_at_retry[8];
} seen;

static void note(seen *s, const llmcb_event *ev)
{
    char hex[8];
    size_t i;

    if (ev->seq != s->seq + 1) s->bad_seq = true;
    s->seq = ev->seq;
    if (s->n_end + s->n_error) s->n_after++;
    switch (ev->kind) {
    case LLMCB_CHAT_MODEL_START:
        s->n_start++;
        break;
    case LLMCB_LLM_NEW_TOKEN:
        s->n_tokens++;
        for (i = 0; i < ev->token->text.len; i++) {
            unsigned char c = (unsigned char)ev->token->text.ptr[i];
            snprintf(hex, sizeof hex, "\\x%02x", c);
            if (c < 0x20) puts_to(&s->tokens, hex);
            else put(&s->tokens, &c, 1);
        }
        put(&s->tokens, "|", 1);
        if (ev->token->choice == 0)
            put(&s->text, ev->token->text.ptr, ev->token->text.len);
        break;
    case LLMCB_RETRY:
        if (s->n_retry < 8) {
            s->delay[s->n_retry] = ev->retry->delay_ms;
            s->status[s->n_retry] = ev->retry->error->http_status;
            s->attempt[s->n_retry] = ev->retry->attempt;
            s->tokens_at_retry[s->n_retry] = s->n_tokens;
        }
        s->n_retry++;
        break;
    case LLMCB_LLM_END:
    case LLMCB_LLM_ERROR:
        if (ev->kind == LLMCB_LLM_END) s->n_end++;
        else s->n_error++;
        if (ev->error) s->error = *ev->error;
        s->complete = ev->result->complete;
        s->sentinel = ev->result->sentinel;
        if (ev->result->n_generations)
            put(&s->partial, ev->result->generations[0].text.ptr,
                ev->result->generations[0].text.len);
        break;
    default:
        break;
    }
}

static int note_sync(llmcb_handler *h, const llmcb_event *ev)
{
    note((seen *)h->user, ev);
    return 0;
}

static llmcb_step note_async(llmcb_task *t, llmcb_handler *h,
                             const llmcb_event *ev)
{
    (void)t;
    note((seen *)h->user, ev);
    return LLMCB_DONE;
}

static void listen_sync(llmcb_handler *h, seen *s, unsigned flags)
{
    memset(h, 0, sizeof *h);
    h->sync.on_chat_model_start = h->sync.on_llm_new_token =
        h->sync.on_llm_end = h->sync.on_llm_error = h->sync.on_retry =
            note_sync;
    h->flags = flags;
    h->user = s;
}

static void listen_async(llmcb_handler *h, seen *s)
{
    memset(h, 0, sizeof *h);
    h->async.on_chat_model_start = h->async.on_llm_new_token =
        h->async.on_llm_end = h->async.on_llm_error = h->async.on_retry =
            note_async;
    h->user = s;
}

static void forget(seen *s)
{
    free(s->tokens.p);
    free(s->text.p);
    free(s->partial.p);
    memset(s, 0, sizeof *s);
}

static const char *of(const bytes *b)
{
    return b->p ? b->p : "";
}

/* ---- a loop with all that is counted ------------------------------------- */

enum { REPLAY, SOCK, CURL_T, N_TRANSPORTS };
static const char *const transport_names[] = { "replay", "sock", "curl" };

typedef struct rig {
    pthread_mutex_t lock; /* workers allocate too */
    long long live;
    bytes log;
    int fds;
    llmcb_loop *loop;
    llmcb_transport *tr;
    server *server;
} rig;

static void *count_resize(void *user, void *ptr, size_t old_size, size_t size)
{
    rig *r = (rig *)user;
    void *p = NULL;

    if (size) p = realloc(ptr, size);
    else free(ptr);
    pthread_mutex_lock(&r->lock);
    if (!size || p) r->live += (long long)size - (long long)old_size;
    pthread_mutex_unlock(&r->lock);
    return p;
}

static void keep_log(void *user, const char *line)
{
    puts_to(&((rig *)user)->log, line);
    puts_to(&((rig *)user)->log, "\n");
}

static int open_fds(void)
{
    int n = 0, fd;

    for (fd = 0; fd < 256; fd++)
        if (fcntl(fd, F_GETFD) >= 0) n++;
    return n;
}

static void rig_loop(rig *r, bool virtual_clock)
{
    llmcb_loop_desc d;

    memset(r, 0, sizeof *r);
    pthread_mutex_init(&r->lock, NULL);
    memset(&d, 0, sizeof d);
    d.allocator.resize = count_resize;
    d.allocator.user = r;
    d.virtual_clock = virtual_clock;
    d.log = keep_log;
    d.log_user = r;
    d.workers = 2;
    r->fds = open_fds();
    r->loop = llmcb_loop_new(&d);
    if (!r->loop) abort();
}

static llmcb_replay_end replay_end(server_end end)
{
    switch (end) {
    case SERVER_CLOSE:
    case SERVER_ACCEPT_CLOSE: return LLMCB_REPLAY_CLOSE;
    case SERVER_RST:
    case SERVER_ACCEPT_RST: return LLMCB_REPLAY_RESET;
    case SERVER_KEEP:
    case SERVER_STALL:
    default: return LLMCB_REPLAY_KEEP;
    }
}

/* A loop with a transport on which these scripts are the answers. */
static void rig_begin(rig *r, int transport, const server_script *scripts,
                      size_t n)
{
    llmcb_recording rec[32];
    llmcb_segment segs[32][64];
    llmcb_replay_desc d;
    size_t i, k;

    rig_loop(r, transport == REPLAY);
    if (transport == REPLAY) {
        memset(rec, 0, sizeof rec);
        for (i = 0; i < n && i < 32; i++) {
            const server_script *s = &scripts[i];
            rec[i].bytes = s->bytes;
            rec[i].len = s->len ? s->len : s->bytes ? strlen(s->bytes) : 0;
            rec[i].end = replay_end(s->end);
            for (k = 0; k < s->n_segments && k < 63; k++) {
                segs[i][k + 1].offset = s->segments[k].offset;
                segs[i][k + 1].delay_ms = s->segments[k].delay_ms;
            }
            segs[i][0].offset = 0;
            segs[i][0].delay_ms = 0;
            rec[i].segments = segs[i];
            rec[i].n_segments = s->n_segments ? s->n_segments + 1 : 0;
        }
        memset(&d, 0, sizeof d);
        d.recordings = rec;
        d.n_recordings = n;
        r->tr = llmcb_replay_new(r->loop, &d);
    } else {
        r->server = server_start(scripts, n);
        r->tr = transport == SOCK ? llmcb_socket_transport(r->loop)
                                  : llmcb_curl_transport(r->loop);
    }
    if (!r->tr || (transport != REPLAY && !r->server)) abort();
}

static llmcb_chat_desc rig_desc(const rig *r)
{
    llmcb_chat_desc d;

    memset(&d, 0, sizeof d);
    d.base_url = r->server ? server_base(r->server) : "http://127.0.0.1/v1";
    d.api_key = KEY;
    d.model = "m";
    d.streaming = true;
    d.max_retries = -1;
    d.transport = r->tr;
    return d;
}

static void rig_end(rig *r)
{
    CHECK_INT(llmcb_loop_free(r->loop), LLMCB_OK);
    server_stop(r->server);
    CHECK_INT(r->live, 0);
    CHECK_INT(open_fds(), r->fds);
    CHECK(!strstr(of(&r->log), KEY));
    CHECK(!strstr(of(&r->log), PROMPT));
    free(r->log.p);
    pthread_mutex_destroy(&r->lock);
}

static const llmcb_message question = { .role = LLMCB_USER,
                                        .content = PROMPT };

static void check_no_canary(const llmcb_error *e)
{
    const char *texts[4];
    size_t i;

    texts[0] = e->message;
    texts[1] = e->type;
    texts[2] = e->provider_code;
    texts[3] = e->request_id;
    for (i = 0; i < 4; i++) {
        CHECK(!strstr(texts[i], "sk-C")); /* nor the beginning of it */
        CHECK(!strstr(texts[i], "CANARY"));
        CHECK(!strstr(texts[i], PROMPT));
    }
    if (e->code != LLMCB_OK) CHECK(strlen(e->message) > 0);
}

/* A finished run as one handler saw it, whatever its outcome was. */
static void check_shape(const seen *s)
{
    CHECK_INT(s->n_start, 1);
    CHECK_INT(s->n_end + s->n_error, 1);
    CHECK_INT(s->n_after, 0);
    CHECK(!s->bad_seq);
    CHECK_INT(s->complete, s->n_end == 1);
    check_no_canary(&s->error);
    CHECK(s->text.len == s->partial.len &&
          memcmp(of(&s->text), of(&s->partial), s->text.len) == 0);
}

/* ---- answers ------------------------------------------------------------- */

#define OK "HTTP/1.1 200 OK\r\n"
#define SSE OK "Content-Type: text/event-stream\r\n"
#define CHUNKED SSE "Transfer-Encoding: chunked\r\n\r\n"
#define DELTA(members) \
    "data: {\"choices\":[{\"index\":0,\"delta\":{" members "}}]}\n\n"
#define EV(t) DELTA("\"content\":\"" t "\"")
#define CHOICE(i, t)                                                 \
    "data: {\"choices\":[{\"index\":" #i ",\"delta\":{\"content\":\"" t \
    "\"}}]}\n\n"
#define FIN_OF(i, r)                                                   \
    "data: {\"choices\":[{\"index\":" #i ",\"delta\":{},\"finish_reason\":\"" \
    r "\"}]}\n\n"
#define FIN(r) FIN_OF(0, r)
#define DONE "data: [DONE]\n\n"
#define TWO EV("Hel") EV("lo")
#define ALL TWO FIN("stop") DONE
#define TWO_TOKENS "Hel|lo|"
#define ALL_TOKENS "Hel|lo||"
#define COMPLETION                                                        \
    "{\"id\":\"c\",\"model\":\"m\",\"choices\":[{\"index\":0,\"message\":" \
    "{\"role\":\"assistant\",\"content\":\"Hello\"},\"finish_reason\":"    \
    "\"stop\"}]}"
#define CLEAN SSE "Content-Length: 81\r\n\r\n" EV("clean") DONE ": end\n"

/* How `head` and `body` of a row become bytes. */
typedef enum framing {
    RAW,     /* one behind the other */
    CHUNK,   /* chunked, a chunk an event, whole */
    CUT,     /* likewise, without the last chunk */
    LENGTH,  /* with its Content-Length */
    TO_CLOSE /* until the connection closes */
} framing;

/* Codes that libcurl makes of it. The row's own: 0. */
#define CURL_OK 1
#define CURL_NO 2 /* it shows something else, or nothing */

#define NEW_CONN 1u /* the next request needs a new connection */
#define SOCK_CONN 8u /* likewise, but libcurl may have read the surplus */
#define AT_ONCE 4u /* the surplus must not come behind the next request */
#define BIG 2u      /* too big to be split at every byte */

typedef struct row {
    int number;
    const char *name;
    const char *head; /* lines with CRLF; NULL: SSE */
    const char *body;
    framing frame;
    server_end end;
    void (*make)(bytes *b); /* instead of the five above but `end` */
    llmcb_code code;
    int curl;
    const char *tokens; /* NULL: not compared */
    const char *curl_tokens; /* NULL: the same */
    unsigned flags;
    int n; /* choices */
    void (*check)(const llmcb_result *r, const llmcb_error *e);
} row;

static void frame_body(bytes *b, const char *body, bool whole)
{
    const char *at = body, *next;

    for (; *at; at = next) {
        next = strstr(at, "\n\n");
        next = next ? next + 2 : at + strlen(at);
        put_chunk(b, at, (size_t)(next - at));
    }
    if (whole) puts_to(b, "0\r\n\r\n");
}

static bytes make_row(const row *r)
{
    bytes b = { NULL, 0, 0 };
    char length[64];
    const char *body = r->body ? r->body : "";

    put(&b, "", 0);
    if (r->make) {
        r->make(&b);
        return b;
    }
    puts_to(&b, r->head ? r->head : r->frame == RAW ? "" : SSE);
    switch (r->frame) {
    case RAW:
        puts_to(&b, body);
        break;
    case CHUNK:
    case CUT:
        puts_to(&b, "Transfer-Encoding: chunked\r\n\r\n");
        frame_body(&b, body, r->frame == CHUNK);
        break;
    case LENGTH:
        snprintf(length, sizeof length, "Content-Length: %lu\r\n\r\n",
                 (unsigned long)strlen(body));
        puts_to(&b, length);
        puts_to(&b, body);
        break;
    case TO_CLOSE:
    default:
        puts_to(&b, "\r\n");
        puts_to(&b, body);
        break;
    }
    return b;
}

/* B */
static void make_nul_header(bytes *b)
{
    puts_to(b, SSE "X-A: a");
    put(b, "", 1);
    puts_to(b, "b\r\nContent-Length: 2\r\n\r\n\n\n");
}

static void make_long_header(bytes *b, size_t n)
{
    puts_to(b, SSE "X-A: ");
    fill(b, 'a', n);
    puts_to(b, "\r\nConnection: close\r\n\r\n" ALL);
}

static void make_header_90k(bytes *b)
{
    make_long_header(b, 90000);
}

static void make_header_200k(bytes *b)
{
    make_long_header(b, 200000);
}

static void make_headers(bytes *b, size_t n, const char *line)
{
    puts_to(b, SSE);
    while (n--) puts_to(b, line);
    puts_to(b, "Connection: close\r\n\r\n" ALL);
}

static void make_headers_40000(bytes *b)
{
    make_headers(b, 40000, "X-A: a\r\n");
}

static void make_interims(bytes *b, size_t n)
{
    while (n--) puts_to(b, "HTTP/1.1 100 Continue\r\n\r\n");
    puts_to(b, SSE "Connection: close\r\n\r\n" ALL);
}

static void make_interims_2000(bytes *b)
{
    make_interims(b, 2000);
}

static void make_interims_9(bytes *b)
{
    make_interims(b, 9);
}

static void make_interims_8(bytes *b)
{
    make_interims(b, 8);
}

/* C */
static void make_400_10mb(bytes *b)
{
    puts_to(b, "HTTP/1.1 400 Bad Request\r\nContent-Length: 10000000\r\n\r\n");
    fill(b, 'x', 10000000);
}

/* D */
static void make_ext(bytes *b, size_t n)
{
    puts_to(b, CHUNKED "5;");
    fill(b, 'e', n);
    puts_to(b, "\r\n: a\n\n\r\n");
    frame_body(b, ALL, true);
}

static void make_ext_1mb(bytes *b)
{
    make_ext(b, 1000000);
}

static void make_ext_256(bytes *b)
{
    make_ext(b, 256);
}

static void make_ext_257(bytes *b)
{
    make_ext(b, 257);
}

static void make_tiny_chunks(bytes *b)
{
    int i;

    puts_to(b, CHUNKED);
    for (i = 0; i < 1000000; i++) {
        const char *s = i % 50 == 0 ? ":" : i % 50 == 49 ? "\n" : "x";
        put_chunk(b, s, 1);
    }
    frame_body(b, ALL, true);
}

static void make_long_trailer(bytes *b)
{
    puts_to(b, CHUNKED);
    frame_body(b, TWO FIN("stop"), false);
    puts_to(b, "0\r\n");
    for (int i = 0; i < 1000; i++) puts_to(b, "X-T: trailer\r\n");
    puts_to(b, "\r\n");
}

static void make_gzip(bytes *b)
{
    static const char gz[] = "\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03";

    puts_to(b, SSE "Content-Encoding: gzip\r\nContent-Length: 10\r\n\r\n");
    put(b, gz, 10);
}

static void make_gzip_350k(bytes *b)
{
    puts_to(b, SSE "Content-Encoding: gzip\r\nContent-Length: 350000\r\n\r\n");
    put(b, "\x1f\x8b\x08", 3);
    fill(b, '\0', 350000 - 3);
}

static void make_split_response(bytes *b)
{
    puts_to(b, CHUNKED);
    frame_body(b, ALL, true);
    puts_to(b, SSE "Connection: keep-alive\r\nContent-Length: 74\r\n\r\n"
                   EV("evil") DONE);
}

/* E */
static void make_line(bytes *b, size_t n)
{
    /* one line of n bytes behind a whole event */
    static const char a[] = "data: {\"choices\":[{\"delta\":{\"content\":\"",
                      z[] = "\"}}]}";

    puts_to(b, SSE "\r\n" EV("Hel"));
    puts_to(b, a);
    fill(b, 'y', n - strlen(a) - strlen(z));
    puts_to(b, z);
    puts_to(b, "\n\n" FIN("stop") DONE);
}

static void make_line_64m(bytes *b)
{
    make_line(b, (size_t)64 << 20);
}

static void make_nul_data(bytes *b)
{
    puts_to(b, SSE "\r\n" EV("Hel") "data: {\"choices\":[{\"index\":0,"
                   "\"delta\":{\"content\":\"a");
    put(b, "", 1);
    puts_to(b, "b\"}}]}\n\n" FIN("stop") DONE);
}

/* F */
static void make_brackets(bytes *b)
{
    puts_to(b, SSE "\r\n" EV("Hel") "data: ");
    fill(b, '[', 10000000);
    puts_to(b, "\n\n" DONE);
}

static void make_objects(bytes *b)
{
    puts_to(b, SSE "\r\n" EV("Hel") "data: ");
    for (int i = 0; i < 2000000; i++) puts_to(b, "{\"a\":");
    puts_to(b, "\n\n" DONE);
}

/* ---- what rows say of the result ----------------------------------------- */

static void check_sentinel(const llmcb_result *r, const llmcb_error *e)
{
    (void)e;
    CHECK(r->sentinel);
}

static void check_no_sentinel(const llmcb_result *r, const llmcb_error *e)
{
    (void)e;
    CHECK(!r->sentinel);
}

static void check_reason(const llmcb_result *r, const char *reason)
{
    REQUIRE(r->n_generations > 0);
    CHECK_STR(r->generations[0].finish_reason.ptr, reason);
}

static void check_stop(const llmcb_result *r, const llmcb_error *e)
{
    (void)e;
    check_reason(r, "stop");
}

static void check_length(const llmcb_result *r, const llmcb_error *e)
{
    (void)e;
    check_reason(r, "length");
}

static void check_filter(const llmcb_result *r, const llmcb_error *e)
{
    (void)e;
    check_reason(r, "content_filter");
}

static void check_no_reason(const llmcb_result *r, const llmcb_error *e)
{
    check_sentinel(r, e);
    check_reason(r, "");
}

static void check_api(const llmcb_result *r, const llmcb_error *e)
{
    (void)r;
    CHECK_STR(e->type, "server_error");
    CHECK_STR(e->provider_code, "boom");
    CHECK(strstr(e->message, "it broke"));
}

static void check_api_text(const llmcb_result *r, const llmcb_error *e)
{
    (void)r;
    CHECK(strstr(e->message, "it broke"));
}

static void check_401(const llmcb_result *r, const llmcb_error *e)
{
    (void)r;
    CHECK_INT(e->http_status, 401);
    CHECK_STR(e->provider_code, "bad_key");
    CHECK_STR(e->request_id, "req_1");
    CHECK(strstr(e->message, "no such key"));
}

static void check_403(const llmcb_result *r, const llmcb_error *e)
{
    (void)r;
    CHECK_INT(e->http_status, 403);
}

static void check_503(const llmcb_result *r, const llmcb_error *e)
{
    (void)r;
    CHECK_INT(e->http_status, 503);
    CHECK(!strstr(e->message, "<"));
}

/* The origin of the target and nothing more of it. */
static void check_redirect(const llmcb_result *r, const llmcb_error *e)
{
    (void)r;
    CHECK(e->http_status == 307 || e->http_status == 302);
    CHECK(!strstr(e->message, "secret"));
}

static void check_redirect_host(const llmcb_result *r, const llmcb_error *e)
{
    check_redirect(r, e);
    CHECK(strstr(e->message, "https://evil.example:8443"));
}

static void check_three(const llmcb_result *r, const llmcb_error *e)
{
    static const char *const texts[] = { "a1a2", "b1b2", "c1c2" };
    size_t i;

    (void)e;
    REQUIRE(r->n_generations == 3);
    for (i = 0; i < 3; i++) CHECK_STR(r->generations[i].text.ptr, texts[i]);
    CHECK_STR(r->generations[1].finish_reason.ptr, "length");
}

/* Calls as "id name arguments valid; ..." */
static void check_calls(const llmcb_result *r, const char *want)
{
    bytes b = { NULL, 0, 0 };
    size_t i;

    REQUIRE(r->n_generations > 0);
    put(&b, "", 0);
    for (i = 0; i < r->generations[0].n_tool_calls; i++) {
        const llmcb_tool_call *c = &r->generations[0].tool_calls[i];
        put(&b, c->id.ptr, c->id.len);
        put(&b, " ", 1);
        put(&b, c->name.ptr, c->name.len);
        put(&b, " ", 1);
        put(&b, c->arguments.ptr, c->arguments.len);
        puts_to(&b, c->valid ? " 1;" : " 0;");
    }
    CHECK_STR(b.p, want);
    free(b.p);
}

#define CALLS_ARE(name, want)                                          \
    static void name(const llmcb_result *r, const llmcb_error *e)      \
    {                                                                  \
        (void)e;                                                       \
        check_calls(r, want);                                          \
    }
CALLS_ARE(check_one_call, "i1 f {\"a\":1} 1;")
CALLS_ARE(check_two_calls, "i1 f {\"a\":1} 1;i2 g {\"b\":2} 1;")
CALLS_ARE(check_same_name, "i1 f {\"a\":1} 1;i2 f {\"b\":2} 1;")
CALLS_ARE(check_cut_call, "i1 f {\"a\": 0;")
CALLS_ARE(check_object_call, "i1 f {\"a\": 1} 1;")

static void check_usage(const llmcb_result *r, const llmcb_error *e)
{
    (void)e;
    CHECK(r->usage.known);
    CHECK_INT(r->usage.input_tokens, 3);
    CHECK_INT(r->usage.output_tokens, 4);
    CHECK_INT(r->usage.total_tokens, 7);
}

#define USAGE(in, out)                                           \
    "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":" #in    \
    ",\"completion_tokens\":" #out "}}\n\n"
#define TOOL(members) DELTA("\"tool_calls\":[{" members "}]")
#define FN(name, args) \
    "\"function\":{\"name\":\"" name "\",\"arguments\":\"" args "\"}"
#define ARGS(args) "\"function\":{\"arguments\":\"" args "\"}"
#define ERR_OBJECT                                                      \
    "{\"message\":\"it broke\",\"type\":\"server_error\",\"code\":\"boom\"}"
#define BOM "\xEF\xBB\xBF"
#define STREAM(events) .body = events, .frame = CHUNK
#define MORE FIN("stop") DONE

static const row rows[] = {
    /* B. The head. */
    { 11, "eof_before_any_byte", .end = SERVER_CLOSE, .code = LLMCB_EIO,
      .tokens = "" },
    { 11, "eof_at_accept", .end = SERVER_ACCEPT_CLOSE, .code = LLMCB_EIO,
      .tokens = "" },
    { 12, "rst_before_any_byte", .end = SERVER_RST, .code = LLMCB_EIO,
      .tokens = "" },
    { 14, "eof_in_status_line", .body = "HTTP/1.1 20", .end = SERVER_CLOSE,
      .code = LLMCB_EPROTO, .curl = LLMCB_EIO, .tokens = "" },
    { 15, "eof_in_header", .body = SSE "Content-Le", .end = SERVER_CLOSE,
      .code = LLMCB_ETRUNCATED, .tokens = "" },
    { 16, "ssh_banner", .body = "SSH-2.0-OpenSSH_9.2\r\n",
      .end = SERVER_STALL, .code = LLMCB_EPROTO, .tokens = "" },
    { 16, "http_0_9", .body = "<html>hi</html>\n", .end = SERVER_CLOSE,
      .code = LLMCB_EPROTO, .tokens = "" },
    { 16, "http_2_preface", .body = "HTTP/2 200\r\n\r\n",
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .curl = CURL_NO,
      .tokens = "" },
    { 17, "no_colon", .body = SSE "nonsense\r\n\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .tokens = "" },
    { 17, "blank_before_colon", .body = SSE "X-A : b\r\n\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .curl = CURL_OK,
      .tokens = "", .curl_tokens = ALL_TOKENS },
    { 18, "nul_in_header", .make = make_nul_header, .end = SERVER_CLOSE,
      .code = LLMCB_EPROTO, .tokens = "" },
    { 18, "bare_cr_in_header", .body = SSE "X-A: a\rb\r\n\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .curl = CURL_OK,
      .tokens = "", .curl_tokens = ALL_TOKENS },
    { 19, "folded_header", .body = SSE "X-A: a\r\n b\r\n\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .curl = CURL_OK,
      .tokens = "", .curl_tokens = ALL_TOKENS },
    { 20, "header_90k", .make = make_header_90k, .end = SERVER_CLOSE,
      .code = LLMCB_ELIMIT, .tokens = "", .flags = BIG },
    { 21, "header_200k", .make = make_header_200k, .end = SERVER_CLOSE,
      .code = LLMCB_ELIMIT, .tokens = "", .flags = BIG },
    { 22, "headers_40000", .make = make_headers_40000, .end = SERVER_CLOSE,
      .code = LLMCB_ELIMIT, .tokens = "", .flags = BIG },
    { 23, "interims_2000", .make = make_interims_2000, .end = SERVER_CLOSE,
      .code = LLMCB_ELIMIT, .tokens = "", .flags = BIG },
    { 23, "interims_9", .make = make_interims_9, .end = SERVER_CLOSE,
      .code = LLMCB_ELIMIT, .tokens = "" },
    { 23, "interims_8", .make = make_interims_8, .end = SERVER_CLOSE,
      .tokens = ALL_TOKENS },
    { 25, "html", .head = OK "Content-Type: text/html\r\n",
      .body = "<html>log in</html>", .frame = LENGTH, .code = LLMCB_ECTYPE,
      .tokens = "" },
    { 25, "html_as_sse", .body = "<html>log in</html>", .frame = LENGTH,
      .code = LLMCB_ECTYPE, .tokens = "" },
    { 25, "html_without_tags", .head = OK "Content-Type: text/html\r\n",
      .body = "please log in", .frame = LENGTH, .code = LLMCB_ECTYPE,
      .tokens = "" },
    { 25, "html_with_nothing", .head = OK "Content-Type: text/html\r\n",
      .body = "", .frame = LENGTH, .code = LLMCB_ECTYPE, .tokens = "" },
    { 26, "json_error", .head = OK "Content-Type: application/json\r\n",
      .body = "{\"error\":" ERR_OBJECT "}", .frame = LENGTH,
      .code = LLMCB_EAPI, .tokens = "", .check = check_api },
    { 26, "json_error_as_sse", .body = "{\"error\":" ERR_OBJECT "}",
      .frame = LENGTH, .code = LLMCB_EAPI, .tokens = "",
      .check = check_api },
    { 26, "json_that_is_nothing",
      .head = OK "Content-Type: application/json\r\n",
      .body = "{\"hello\":1}", .frame = LENGTH, .code = LLMCB_EPROTO,
      .tokens = "" },
    { 27, "json_completion",
      .head = OK "Content-Type: application/json\r\n", .body = COMPLETION,
      .frame = LENGTH, .tokens = "Hello|", .check = check_stop },
    { 27, "json_completion_cut",
      .head = OK "Content-Type: application/json\r\n"
              "Content-Length: 1000\r\n\r\n" COMPLETION,
      .end = SERVER_CLOSE, .code = LLMCB_OK, .tokens = "Hello|" },
    { 27, "json_cut", .head = OK "Content-Type: application/json\r\n"
                              "Content-Length: 1000\r\n\r\n{\"choices\":[",
      .end = SERVER_CLOSE, .code = LLMCB_ETRUNCATED, .tokens = "" },
    { 28, "empty_body", .body = "", .frame = LENGTH,
      .code = LLMCB_ETRUNCATED, .tokens = "" },
    { 28, "empty_chunked", .body = "", .frame = CHUNK,
      .code = LLMCB_ETRUNCATED, .tokens = "" },
    { 28, "status_204", .body = "HTTP/1.1 204 No Content\r\n\r\n",
      .code = LLMCB_ETRUNCATED, .tokens = "" },
    { 28, "done_alone", STREAM(DONE), .code = LLMCB_ETRUNCATED,
      .tokens = "" },
    { 29, "redirect_to_host",
      .head = "HTTP/1.1 307 Temporary Redirect\r\n"
              "Location: https://evil.example:8443/v1?token=secret\r\n",
      .body = "go away", .frame = LENGTH, .code = LLMCB_EREDIRECT,
      .tokens = "", .check = check_redirect_host },
    { 29, "redirect_to_file",
      .head = "HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n",
      .body = "", .frame = LENGTH, .code = LLMCB_EREDIRECT, .tokens = "",
      .check = check_redirect },
    { 29, "redirect_to_ftp",
      .head = "HTTP/1.1 302 Found\r\nLocation: ftp://evil.example/secret\r\n",
      .body = "", .frame = LENGTH, .code = LLMCB_EREDIRECT, .tokens = "",
      .check = check_redirect },
    { 29, "redirect_relative",
      .head = "HTTP/1.1 307 Temporary Redirect\r\n"
              "Location: /v1/chat/completions\r\n",
      .body = "", .frame = LENGTH, .code = LLMCB_EREDIRECT, .tokens = "",
      .check = check_redirect },
    { 29, "redirect_to_unix",
      .head = "HTTP/1.1 302 Found\r\nLocation: unix:/run/secret:/v1\r\n",
      .body = "", .frame = LENGTH, .code = LLMCB_EREDIRECT, .tokens = "",
      .check = check_redirect },
    { 29, "redirect_with_key",
      .head = "HTTP/1.1 302 Found\r\nLocation: http://" KEY ".example/\r\n",
      .body = "", .frame = LENGTH, .code = LLMCB_EREDIRECT, .tokens = "",
      .check = check_redirect },
    { 29, "redirect_to_nowhere", .head = "HTTP/1.1 302 Found\r\n",
      .body = "", .frame = LENGTH, .code = LLMCB_EREDIRECT, .tokens = "",
      .check = check_redirect },

    /* C. Statuses; what is about retries is below. */
    { 30, "status_401",
      .head = "HTTP/1.1 401 Unauthorized\r\nX-Request-Id: req_1\r\n",
      .body = "{\"error\":{\"message\":\"no such key\",\"code\":\"bad_key\"}}",
      .frame = LENGTH, .code = LLMCB_EHTTP, .tokens = "",
      .check = check_401 },
    { 30, "key_echoed", .head = "HTTP/1.1 403 Forbidden\r\nX-Request-Id: " KEY
                                "\r\n",
      .body = "{\"error\":{\"message\":\"bad key " KEY ", really " KEY
              "\",\"type\":\"" KEY "\",\"code\":\"" KEY "\"}}",
      .frame = LENGTH, .code = LLMCB_EHTTP, .tokens = "",
      .check = check_403 },
    { 30, "key_echoed_escaped", .head = "HTTP/1.1 403 Forbidden\r\n",
      .body = "{\"error\":{\"message\":\"bad key \\u0073\\u006b"
              "-\\u0043ANARY-4f1d9b7c2e\"}}",
      .frame = LENGTH, .code = LLMCB_EHTTP, .tokens = "",
      .check = check_403 },
    { 30, "html_503", .head = "HTTP/1.1 503 Service Unavailable\r\n",
      .body = "<html>down</html>", .frame = LENGTH, .code = LLMCB_EHTTP,
      .tokens = "", .check = check_503 },
    { 31, "status_400_10mb", .make = make_400_10mb, .code = LLMCB_EHTTP,
      .tokens = "", .flags = BIG | NEW_CONN },

    /* D. Framing. */
    { 42, "eof_between_chunks", .body = TWO, .frame = CUT,
      .end = SERVER_CLOSE, .code = LLMCB_ETRUNCATED, .tokens = TWO_TOKENS },
    { 42, "eof_between_chunks_finished", .body = TWO FIN("stop"),
      .frame = CUT, .end = SERVER_CLOSE, .tokens = ALL_TOKENS,
      .check = check_no_sentinel },
    { 43, "eof_after_done", .body = ALL, .frame = CUT, .end = SERVER_CLOSE,
      .tokens = ALL_TOKENS, .flags = NEW_CONN, .check = check_sentinel },
    { 43, "rst_after_done", .body = ALL, .frame = CUT, .end = SERVER_RST,
      .tokens = ALL_TOKENS, .flags = NEW_CONN, .check = check_sentinel },
    { 44, "eof_in_chunk",
      .body = CHUNKED "ff\r\n" TWO "data: {\"choices\":[{\"index\"",
      .end = SERVER_CLOSE, .code = LLMCB_ETRUNCATED, .tokens = TWO_TOKENS },
    { 44, "eof_in_chunk_size", .body = CHUNKED "f", .end = SERVER_CLOSE,
      .code = LLMCB_ETRUNCATED, .tokens = "" },
    { 44, "eof_in_last_chunk", .body = CHUNKED "0\r\n", .end = SERVER_CLOSE,
      .code = LLMCB_ETRUNCATED, .tokens = "" },
    { 45, "rst_in_chunk",
      .body = CHUNKED "ff\r\n" TWO "data: {\"choices\":[{\"index\"",
      .end = SERVER_RST, .code = LLMCB_EIO, .tokens = TWO_TOKENS },
    { 45, "rst_finished", .body = TWO FIN("stop"), .frame = CUT,
      .end = SERVER_RST, .code = LLMCB_EIO, .tokens = ALL_TOKENS },
    { 46, "eof_closes_body", .body = TWO, .frame = TO_CLOSE,
      .end = SERVER_CLOSE, .code = LLMCB_ETRUNCATED, .tokens = TWO_TOKENS },
    { 47, "rst_closes_body", .body = TWO, .frame = TO_CLOSE,
      .end = SERVER_RST, .code = LLMCB_EIO, .tokens = TWO_TOKENS },
    { 48, "length_too_large",
      .body = SSE "Content-Length: 1000\r\n\r\n" TWO, .end = SERVER_CLOSE,
      .code = LLMCB_ETRUNCATED, .tokens = TWO_TOKENS },
    { 49, "length_too_small",
      .body = SSE "Content-Length: 100\r\n\r\n" ALL, .end = SERVER_KEEP,
      .code = LLMCB_ETRUNCATED, .tokens = "Hel|",
      .flags = SOCK_CONN | AT_ONCE },
    { 50, "length_negative",
      .body = SSE "Content-Length: -5\r\n\r\n" ALL, .end = SERVER_CLOSE,
      .code = LLMCB_EPROTO, .tokens = "" },
    { 50, "length_plus", .body = SSE "Content-Length: +5\r\n\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .curl = CURL_NO,
      .tokens = "" },
    { 50, "length_empty", .body = SSE "Content-Length:\r\n\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .curl = CURL_NO,
      .tokens = "" },
    { 51, "length_overflows",
      .body = SSE "Content-Length: 99999999999999999999\r\n\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .curl = CURL_OK,
      .tokens = "", .curl_tokens = ALL_TOKENS },
    { 51, "length_over_limit",
      .body = SSE "Content-Length: 9999999999\r\n\r\n" TWO,
      .end = SERVER_CLOSE, .code = LLMCB_ELIMIT, .curl = LLMCB_ETRUNCATED,
      .tokens = "", .curl_tokens = TWO_TOKENS },
    { 52, "length_junk", .body = SSE "Content-Length: 12abc\r\n\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .curl = LLMCB_ETRUNCATED,
      .tokens = "", .flags = AT_ONCE },
    { 53, "length_twice",
      .body = SSE "Content-Length: 5\r\nContent-Length: 6\r\n\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .curl = LLMCB_ETRUNCATED,
      .tokens = "", .flags = AT_ONCE },
    { 53, "length_twice_equal",
      .body = SSE "Content-Length: 5\r\nContent-Length: 5\r\n\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_ETRUNCATED, .tokens = "",
      .flags = AT_ONCE },
    { 54, "length_and_chunked",
      .head = SSE "Content-Length: 5\r\n", STREAM(ALL),
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .curl = CURL_OK,
      .tokens = "", .curl_tokens = ALL_TOKENS },
    { 55, "unknown_coding",
      .body = SSE "Transfer-Encoding: rot13\r\n\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .tokens = "" },
    { 55, "chunked_twice",
      .head = SSE "Transfer-Encoding: chunked\r\n", STREAM(ALL),
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .curl = CURL_NO,
      .tokens = "" },
    { 56, "chunk_size_zz", .body = CHUNKED "zz\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .tokens = "" },
    { 56, "chunk_size_negative", .body = CHUNKED "-5\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .tokens = "" },
    { 56, "chunk_size_16f", .body = CHUNKED "ffffffffffffffff\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .tokens = "" },
    { 56, "chunk_size_17f", .body = CHUNKED "fffffffffffffffff\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .tokens = "" },
    { 56, "chunk_size_wraps", /* 2^64 + 5 */
      .body = CHUNKED "10000000000000005\r\n: a\n\n\r\n0\r\n\r\n",
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .tokens = "" },
    { 56, "chunk_size_0x", .body = CHUNKED "0x5\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .curl = CURL_NO,
      .tokens = "" },
    { 56, "chunk_size_blank", .body = CHUNKED " 5\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .tokens = "" },
    { 56, "chunk_size_none", .body = CHUNKED "\r\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .tokens = "" },
    { 57, "chunk_size_7f", .body = CHUNKED "7fffffffffffffff\r\n" TWO,
      .end = SERVER_CLOSE, .code = LLMCB_ELIMIT, .curl = LLMCB_ETRUNCATED,
      .tokens = "", .curl_tokens = TWO_TOKENS },
    { 58, "bare_lf_chunks",
      .body = CHUNKED "5\n: a\n\n\n0\n\n", .end = SERVER_CLOSE,
      .code = LLMCB_EPROTO, .curl = LLMCB_ETRUNCATED, .tokens = "" },
    { 58, "bare_lf_head",
      .body = "HTTP/1.1 200 OK\nContent-Type: text/event-stream\n\n" ALL,
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .curl = CURL_OK,
      .tokens = "", .curl_tokens = ALL_TOKENS },
    { 59, "extension_1mb", .make = make_ext_1mb, .end = SERVER_CLOSE,
      .code = LLMCB_ELIMIT, .curl = CURL_OK, .tokens = "",
      .curl_tokens = ALL_TOKENS, .flags = BIG },
    { 59, "extension_256", .make = make_ext_256, .tokens = ALL_TOKENS },
    { 59, "extension_257", .make = make_ext_257, .code = LLMCB_ELIMIT,
      .curl = CURL_OK, .tokens = "", .curl_tokens = ALL_TOKENS },
    { 60, "tiny_chunks", .make = make_tiny_chunks, .end = SERVER_CLOSE,
      .code = LLMCB_ELIMIT, .curl = CURL_OK, .tokens = "",
      .curl_tokens = ALL_TOKENS, .flags = BIG },
    { 61, "junk_behind_chunk",
      .body = CHUNKED "5\r\n: a\n\nxx5\r\n: b\n\n\r\n0\r\n\r\n",
      .end = SERVER_CLOSE, .code = LLMCB_EPROTO, .tokens = "" },
    { 62, "trailers",
      .body = CHUNKED "5\r\n: a\n\n\r\n0\r\nContent-Length: 7\r\n"
                      "X-T: t\r\n\r\n",
      .code = LLMCB_ETRUNCATED, .tokens = "" },
    { 62, "trailer_too_long", .make = make_long_trailer,
      .end = SERVER_CLOSE, .code = LLMCB_ELIMIT, .curl = CURL_NO,
      .tokens = ALL_TOKENS, .flags = BIG },
    { 63, "gzip", .make = make_gzip, .code = LLMCB_ECTYPE, .tokens = "" },
    { 64, "gzip_bomb", .make = make_gzip_350k, .code = LLMCB_ECTYPE,
      .tokens = "", .flags = BIG },
    { 65, "gzip_cut",
      .head = SSE "Content-Encoding: gzip\r\nContent-Length: 9\r\n\r\n",
      .end = SERVER_CLOSE, .code = LLMCB_ECTYPE, .tokens = "" },
    { 65, "brotli", .head = SSE "Content-Encoding: br\r\n", .body = "xxxx",
      .frame = LENGTH, .code = LLMCB_ECTYPE, .tokens = "" },
    { 66, "response_splitting", .make = make_split_response,
      .tokens = ALL_TOKENS, .flags = SOCK_CONN | AT_ONCE },

    /* E. Event streams. */
    { 68, "plain", STREAM(ALL), .tokens = ALL_TOKENS,
      .check = check_sentinel },
    { 69, "cr",
      .head = SSE, .frame = LENGTH,
      .body = "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\r\r"
              "data: {\"choices\":[{\"delta\":{\"content\":\"b\"}}]}\r\r"
              "data: [DONE]\r\r",
      .tokens = "a|b|" },
    { 69, "crlf",
      .head = SSE, .frame = LENGTH,
      .body = "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\r\n\r\n"
              "data: {\"choices\":[{\"delta\":{\"content\":\"b\"}}]}\r\n\r\n"
              "data: [DONE]\r\n\r\n",
      .tokens = "a|b|" },
    { 69, "mixed",
      .head = SSE, .frame = LENGTH,
      .body = ": c\r:d\n:e\r\n"
              "data: {\"choices\":[\rdata: {\"delta\":{\"content\":\"a\"}}]}"
              "\r\n\n"
              "data: {\"choices\":[{\"delta\":{\"content\":\"b\"}}]}\n\r"
              "data: [DONE]\r\r\n",
      .tokens = "a|b|" },
    { 70, "bom", STREAM(BOM ALL), .tokens = ALL_TOKENS },
    { 70, "bom_twice", STREAM(BOM BOM ALL), .tokens = "lo||" },
    { 70, "bom_later", STREAM(EV("Hel") BOM EV("lo") MORE),
      .tokens = "Hel||" },
    { 70, "bom_begun", STREAM("\xEF\xBB" EV("Hel") EV("lo") MORE),
      .tokens = "lo||" },
    { 70, "bom_in_text", STREAM(EV(BOM) MORE), .tokens = BOM "||" },
    { 71, "ping", STREAM(": ping\n\n" EV("Hel") ": ping\n\n" EV("lo") MORE),
      .tokens = ALL_TOKENS },
    { 71, "ping_with_id",
      STREAM("id: 1\n\n" EV("Hel") "id: 2\n: ping\n\n" EV("lo") MORE),
      .tokens = ALL_TOKENS },
    { 72, "no_blank",
      STREAM("data:{\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n"
             "data:[DONE]\n\n"),
      .tokens = "a|" },
    { 72, "two_blanks",
      STREAM("data:  {\"choices\":[{\"delta\":{\"content\":\" a\"}}]}\n\n"
             MORE),
      .tokens = " a||" },
    { 72, "data_alone", STREAM("data\n\ndata:\n\ndata: \n\n" ALL),
      .tokens = ALL_TOKENS },
    { 73, "many_data_lines",
      STREAM("data: {\"choices\":\ndata: [{\"delta\":\ndata\ndata:"
             "{\"content\":\"a\"}}]}\n\n" MORE),
      .tokens = "a||" },
    { 73, "newline_in_string", /* joined by LF: not valid in a string */
      STREAM(EV("Hel")
             "data: {\"choices\":[{\"delta\":{\"content\":\"a\ndata: b\"}}]}"
             "\n\n" MORE),
      .code = LLMCB_EJSON, .tokens = "Hel|" },
    { 74, "event_error_flat",
      STREAM(TWO "event: error\ndata: " ERR_OBJECT "\n\n" MORE),
      .code = LLMCB_EAPI, .tokens = TWO_TOKENS, .check = check_api },
    { 74, "event_error_nested",
      STREAM(TWO "event: error\ndata: {\"error\":" ERR_OBJECT "}\n\n" MORE),
      .code = LLMCB_EAPI, .tokens = TWO_TOKENS, .check = check_api },
    { 74, "event_error_no_json",
      STREAM(TWO "event: error\ndata: it broke\n\n" MORE),
      .code = LLMCB_EAPI, .tokens = TWO_TOKENS },
    { 75, "unknown_fields",
      STREAM("foo: bar\nretry: 1e9\nid: 5\nevent: x\n" ALL),
      .tokens = ALL_TOKENS },
    { 75, "field_without_colon", STREAM("nonsense\n" ALL),
      .tokens = ALL_TOKENS },
    { 76, "behind_done",
      STREAM(ALL "data: {\"broken\n\n" EV("AFTER")
             "event: error\ndata: {}\n\n"),
      .tokens = ALL_TOKENS, .check = check_sentinel },
    { 77, "done_x", STREAM(TWO "data: [DONE]x\n\n" MORE),
      .code = LLMCB_EJSON, .tokens = TWO_TOKENS },
    { 77, "blank_done", STREAM(TWO "data:  [DONE]\n\n" MORE),
      .code = LLMCB_EJSON, .tokens = TWO_TOKENS },
    { 77, "done_line", STREAM(TWO "data: [DONE]\ndata: x\n\n" MORE),
      .code = LLMCB_EJSON, .tokens = TWO_TOKENS },
    { 77, "done_small", STREAM(TWO "data: [done]\n\n" MORE),
      .code = LLMCB_EJSON, .tokens = TWO_TOKENS },
    { 78, "undispatched",
      .body = TWO "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n",
      .frame = TO_CLOSE, .end = SERVER_CLOSE, .code = LLMCB_ETRUNCATED,
      .tokens = TWO_TOKENS },
    { 78, "undispatched_finish",
      .body = TWO "data: {\"choices\":[{\"finish_reason\":\"stop\"}]}\n",
      .frame = TO_CLOSE, .end = SERVER_CLOSE, .code = LLMCB_ETRUNCATED,
      .tokens = TWO_TOKENS },
    { 78, "undispatched_done", .body = TWO "data: [DONE]\n",
      .frame = TO_CLOSE, .end = SERVER_CLOSE, .code = LLMCB_ETRUNCATED,
      .tokens = TWO_TOKENS },
    { 78, "undispatched_behind_finish",
      .body = TWO FIN("stop") "data: {\"choi", .frame = TO_CLOSE,
      .end = SERVER_CLOSE, .tokens = ALL_TOKENS,
      .check = check_no_sentinel },
    { 79, "line_64m", .make = make_line_64m, .end = SERVER_CLOSE,
      .code = LLMCB_ELIMIT, .tokens = "Hel|", .flags = BIG | NEW_CONN },
    { 82, "nul", .make = make_nul_data, .end = SERVER_CLOSE,
      .code = LLMCB_EJSON, .tokens = "Hel|" },
    { 82, "ff", STREAM(EV("Hel") EV("a\xFF""b") MORE),
      .tokens = "Hel|a\xEF\xBF\xBD""b||" },
    { 82, "overlong", STREAM(EV("\xC0\xAF") EV("x") MORE),
      .tokens = "\xEF\xBF\xBD\xEF\xBF\xBD|x||" },
    { 82, "surrogate_in_utf8", STREAM(EV("\xED\xA0\x80") EV("x") MORE),
      .tokens = "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD|x||" },
    { 82, "half_characters", /* cut by the server between two tokens */
      STREAM(EV("\xE2\x82") EV("\xAC") EV("\xF0\x9F") EV("\x98\x80") MORE),
      .tokens = "|\xE2\x82\xAC||\xF0\x9F\x98\x80||" },
    { 82, "half_character_lost", STREAM(EV("a\xE2\x82") DONE),
      .tokens = "a|\xEF\xBF\xBD|" },

    /* F. JSON and what it means. */
    { 83, "malformed",
      STREAM(TWO "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}]}\n\n"
             MORE),
      .code = LLMCB_EJSON, .tokens = TWO_TOKENS },
    { 83, "truncated", STREAM(TWO "data: {\"choices\":[{\n\n"),
      .code = LLMCB_EJSON, .tokens = TWO_TOKENS },
    { 83, "trailing_comma", STREAM(TWO "data: {\"choices\":[],}\n\n" MORE),
      .code = LLMCB_EJSON, .tokens = TWO_TOKENS },
    { 83, "two_values", STREAM(TWO "data: {} {}\n\n" MORE),
      .code = LLMCB_EJSON, .tokens = TWO_TOKENS },
    { 83, "no_object", STREAM(TWO "data: 5\n\n" MORE),
      .code = LLMCB_EJSON, .tokens = TWO_TOKENS },
    { 84, "brackets_10mb", .make = make_brackets, .end = SERVER_CLOSE,
      .code = LLMCB_EJSON, .tokens = "Hel|", .flags = BIG },
    { 84, "objects_10mb", .make = make_objects, .end = SERVER_CLOSE,
      .code = LLMCB_ELIMIT, .tokens = "Hel|", .flags = BIG },
    { 85, "numbers",
      STREAM("data: {\"created\":1e999,\"x\":-0,\"y\":12345678901234567890,"
             "\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"}}]}\n\n"
             MORE),
      .tokens = "a||" },
    { 85, "index_huge", STREAM(TWO CHOICE(4294967295, "x") MORE),
      .code = LLMCB_ELIMIT, .tokens = TWO_TOKENS },
    { 85, "index_2_63", STREAM(TWO CHOICE(9223372036854775807, "x") MORE),
      .code = LLMCB_ELIMIT, .tokens = TWO_TOKENS },
    { 85, "index_20_digits", STREAM(CHOICE(99999999999999999999, "x") MORE),
      .tokens = "x||" },
    { 85, "index_negative", STREAM(CHOICE(-1, "x") MORE), .tokens = "x||" },
    { 85, "index_fraction", STREAM(CHOICE(1.5, "x") MORE), .tokens = "x||" },
    { 85, "index_string", STREAM(CHOICE("0", "x") MORE), .tokens = "x||" },
    { 85, "tool_index_huge",
      STREAM(TOOL("\"index\":4294967295,\"id\":\"i1\"," FN("f", "{\\\"a\\\""))
             TOOL("\"index\":4294967295," ARGS(":1}"))
             MORE),
      .tokens = "|||", .check = check_one_call },
    { 85, "usage_odd",
      STREAM(TWO "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,"
             "\"completion_tokens\":4,\"total_tokens\":1e999}}\n\n" MORE),
      .tokens = "Hel|lo|||", .check = check_usage },
    { 86, "escapes", STREAM(EV("\\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e9\\u20AC")
                            MORE),
      .tokens = "\"\\/\\x08\\x0c\\x0a\\x0d\\x09\xC3\xA9\xE2\x82\xAC||" },
    { 86, "surrogates", STREAM(EV("\\ud83d\\ude00") MORE),
      .tokens = "\xF0\x9F\x98\x80||" },
    { 86, "surrogates_in_two_tokens", STREAM(EV("\\ud83d") EV("\\ude00")
                                             MORE),
      .tokens = "|\xF0\x9F\x98\x80||" },
    { 86, "lone_high", STREAM(EV("\\ud83dx") MORE),
      .tokens = "\xEF\xBF\xBDx||" },
    { 86, "lone_low", STREAM(EV("\\ude00x") MORE),
      .tokens = "\xEF\xBF\xBDx||" },
    { 86, "nul", STREAM(EV("a\\u0000b") MORE), .tokens = "a\\x00b||" },
    { 86, "bad_escape", STREAM(EV("Hel") EV("\\x") MORE),
      .code = LLMCB_EJSON, .tokens = "Hel|" },
    { 87, "choices_empty", STREAM(EV("Hel") "data: {\"choices\":[]}\n\n"
                                  EV("lo") MORE),
      .tokens = ALL_TOKENS },
    { 87, "choices_missing", STREAM(EV("Hel") "data: {}\n\n" EV("lo") MORE),
      .tokens = ALL_TOKENS },
    { 87, "choices_null", STREAM(EV("Hel") "data: {\"choices\":null}\n\n"
                                 EV("lo") MORE),
      .tokens = ALL_TOKENS },
    { 87, "choices_object", STREAM(EV("Hel") "data: {\"choices\":{}}\n\n"
                                   EV("lo") MORE),
      .tokens = ALL_TOKENS },
    { 87, "choices_of_numbers",
      STREAM(EV("Hel") "data: {\"choices\":[1,null,[]]}\n\n" EV("lo") MORE),
      .tokens = ALL_TOKENS },
    { 87, "delta_null",
      STREAM(EV("Hel") "data: {\"choices\":[{\"index\":0,\"delta\":null}]}"
             "\n\n" EV("lo") MORE),
      .tokens = ALL_TOKENS },
    { 87, "delta_missing",
      STREAM(EV("Hel") "data: {\"choices\":[{\"index\":0}]}\n\n" EV("lo")
             MORE),
      .tokens = ALL_TOKENS },
    { 87, "content_null", STREAM(DELTA("\"content\":null") ALL),
      .tokens = "|" ALL_TOKENS },
    { 87, "content_number", STREAM(DELTA("\"content\":5") ALL),
      .tokens = "|" ALL_TOKENS },
    { 87, "content_array", STREAM(DELTA("\"content\":[\"x\"]") ALL),
      .tokens = "|" ALL_TOKENS },
    { 87, "tool_calls_null", STREAM(DELTA("\"tool_calls\":null") ALL),
      .tokens = "|" ALL_TOKENS },
    { 87, "nothing_but_empty_choices",
      STREAM("data: {\"choices\":[]}\n\n" DONE), .code = LLMCB_ETRUNCATED,
      .tokens = "" },
    { 88, "role_first",
      STREAM(DELTA("\"role\":\"assistant\",\"content\":\"\"") EV("") ALL),
      .tokens = "||" ALL_TOKENS },
    { 89, "error_object",
      STREAM(TWO "data: {\"error\":" ERR_OBJECT "}\n\n" MORE),
      .code = LLMCB_EAPI, .tokens = TWO_TOKENS, .check = check_api },
    { 89, "error_text", STREAM(TWO "data: {\"error\":\"it broke\"}\n\n" MORE),
      .code = LLMCB_EAPI, .tokens = TWO_TOKENS, .check = check_api_text },
    { 89, "error_null",
      STREAM(EV("Hel") "data: {\"error\":null,\"choices\":[{\"index\":0,"
             "\"delta\":{\"content\":\"lo\"}}]}\n\n" MORE),
      .tokens = ALL_TOKENS },
    { 89, "error_beside_choices",
      STREAM(TWO "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}],"
             "\"error\":" ERR_OBJECT "}\n\n" MORE),
      .code = LLMCB_EAPI, .tokens = TWO_TOKENS, .check = check_api },
    { 89, "error_before_eof", .body = TWO "data: {\"error\":" ERR_OBJECT
                                      "}\n\n",
      .frame = CUT, .end = SERVER_RST, .code = LLMCB_EAPI,
      .tokens = TWO_TOKENS, .check = check_api },
    { 90, "finish_twice",
      STREAM(TWO FIN("stop") FIN("length") DONE), .tokens = "Hel|lo|||",
      .check = check_stop },
    { 90, "text_behind_finish", STREAM(EV("Hel") FIN("stop") EV("lo") DONE),
      .tokens = "Hel||lo|", .check = check_stop },
    { 90, "text_with_finish",
      STREAM(EV("Hel") "data: {\"choices\":[{\"index\":0,\"delta\":"
             "{\"content\":\"lo\"},\"finish_reason\":\"stop\"}]}\n\n" DONE),
      .tokens = TWO_TOKENS, .check = check_stop },
    { 91, "done_without_reason", STREAM(TWO DONE), .tokens = TWO_TOKENS,
      .check = check_no_reason },
    { 91, "reason_without_done", STREAM(TWO FIN("stop")),
      .tokens = ALL_TOKENS, .check = check_no_sentinel },
    { 91, "reason_without_done_eof", .body = TWO FIN("stop"),
      .frame = TO_CLOSE, .end = SERVER_CLOSE, .tokens = ALL_TOKENS,
      .check = check_no_sentinel },
    { 91, "no_evidence", STREAM(TWO), .code = LLMCB_ETRUNCATED,
      .tokens = TWO_TOKENS },
    { 91, "one_of_two_finished",
      STREAM(CHOICE(0, "a") CHOICE(1, "b") FIN("stop")),
      .code = LLMCB_ETRUNCATED, .tokens = "a|b||", .n = 2 },
    { 91, "second_never_came", STREAM(CHOICE(0, "a") FIN("stop")),
      .code = LLMCB_ETRUNCATED, .tokens = "a||", .n = 2 },
    { 92, "length", STREAM(TWO FIN("length") DONE), .tokens = ALL_TOKENS,
      .check = check_length },
    { 92, "content_filter", STREAM(TWO FIN("content_filter") DONE),
      .tokens = ALL_TOKENS, .check = check_filter },
    { 93, "three_choices",
      STREAM(CHOICE(2, "c1") CHOICE(0, "a1") CHOICE(1, "b1") CHOICE(0, "a2")
             FIN_OF(0, "stop") CHOICE(2, "c2") CHOICE(1, "b2")
             FIN_OF(1, "length") FIN_OF(2, "stop") DONE),
      .tokens = "c1|a1|b1|a2||c2|b2|||", .n = 3, .check = check_three },
    { 93, "three_choices_in_one_event",
      STREAM("data: {\"choices\":["
             "{\"index\":2,\"delta\":{\"content\":\"c1c2\"}},"
             "{\"index\":0,\"delta\":{\"content\":\"a1a2\"}},"
             "{\"index\":1,\"delta\":{\"content\":\"b1b2\"},"
             "\"finish_reason\":\"length\"}]}\n\n" DONE),
      .tokens = "c1c2|a1a2|b1b2|", .n = 3, .check = check_three },
    { 94, "tool_no_index",
      STREAM(TOOL("\"id\":\"i1\"," FN("f", "{\\\"a\\\"")) TOOL(ARGS(":1}"))
             TOOL("\"id\":\"i2\"," FN("g", "{\\\"b\\\":")) TOOL(ARGS("2}"))
             MORE),
      .tokens = "|||||", .check = check_two_calls },
    { 94, "tool_whole_no_index",
      STREAM(DELTA("\"tool_calls\":[{\"id\":\"i1\","
                   FN("f", "{\\\"a\\\":1}") "},{\"id\":\"i2\","
                   FN("g", "{\\\"b\\\":2}") "}]")
             MORE),
      .tokens = "||", .check = check_two_calls },
    { 94, "tool_index_repeated",
      STREAM(TOOL("\"index\":0,\"id\":\"i1\"," FN("f", "{\\\"a\\\":1}"))
             TOOL("\"index\":0,\"id\":\"i2\"," FN("f", "{\\\"b\\\":2}"))
             MORE),
      .tokens = "|||", .check = check_same_name },
    { 94, "tool_index_null",
      STREAM(TOOL("\"index\":null,\"id\":\"i1\"," FN("f", "{\\\"a\\\":"))
             TOOL("\"index\":null," ARGS("1}"))
             MORE),
      .tokens = "|||", .check = check_one_call },
    { 94, "tool_id_later",
      STREAM(TOOL("\"index\":0," FN("f", "{"))
             TOOL("\"index\":0,\"id\":\"i1\"," ARGS("\\\"a\\\":1}"))
             MORE),
      .tokens = "|||", .check = check_one_call },
    { 94, "tool_id_and_name_null_later",
      STREAM(TOOL("\"index\":0,\"id\":\"i1\"," FN("f", "{"))
             TOOL("\"index\":0,\"id\":null,\"function\":{\"name\":null,"
                  "\"arguments\":\"\\\"a\\\":1}\"}")
             TOOL("\"index\":0,\"id\":\"\"," FN("", ""))
             MORE),
      .tokens = "||||", .check = check_one_call },
    { 94, "tool_interleaved",
      STREAM(TOOL("\"index\":0,\"id\":\"i1\"," FN("f", "{\\\"a\\\":"))
             TOOL("\"index\":1,\"id\":\"i2\"," FN("g", "{\\\"b\\\":"))
             TOOL("\"index\":0," ARGS("1}")) TOOL("\"index\":1," ARGS("2}"))
             MORE),
      .tokens = "|||||", .check = check_two_calls },
    { 94, "tool_arguments_object",
      STREAM(TOOL("\"index\":0,\"id\":\"i1\",\"function\":{\"name\":\"f\","
                  "\"arguments\":{\"a\": 1}}")
             MORE),
      .tokens = "||", .check = check_object_call },
    { 94, "tool_arguments_cut", /* never repaired */
      STREAM(TOOL("\"index\":0,\"id\":\"i1\"," FN("f", "{\\\"a\\\":")) MORE),
      .tokens = "||", .check = check_cut_call },
    { 94, "tool_reason_stop",
      STREAM(TOOL("\"index\":0,\"id\":\"i1\"," FN("f", "{\\\"a\\\":1}"))
             FIN("stop") DONE),
      .tokens = "||", .check = check_one_call },
    { 95, "usage_before", STREAM(USAGE(3, 4) ALL),
      .tokens = "|" ALL_TOKENS, .check = check_usage },
    { 95, "usage_behind", STREAM(TWO FIN("stop") USAGE(3, 4) DONE),
      .tokens = ALL_TOKENS "|", .check = check_usage },
    { 95, "usage_twice", STREAM(TWO FIN("stop") USAGE(1, 2) USAGE(3, 4) DONE),
      .tokens = ALL_TOKENS "||", .check = check_usage },
    { 95, "usage_null_later",
      STREAM(USAGE(3, 4) TWO
             "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}],"
             "\"usage\":null}\n\n" DONE),
      .tokens = "|" ALL_TOKENS, .check = check_usage },
};

#define N_ROWS (sizeof rows / sizeof *rows)

/* ---- running a row ------------------------------------------------------- */

static llmcb_code row_code(const row *r, int transport)
{
    if (transport != CURL_T || !r->curl) return r->code;
    return r->curl == CURL_OK ? LLMCB_OK : (llmcb_code)r->curl;
}

static const char *row_tokens(const row *r, int transport)
{
    return transport == CURL_T && r->curl_tokens ? r->curl_tokens : r->tokens;
}

/* Runs until op is done; every turn must have a cause. */
static llmcb_code finish(rig *r, llmcb_op *op, size_t len)
{
    size_t turns = 0, most = 2000 + 8 * len;

    while (!llmcb_op_done(op) && turns++ < most)
        llmcb_loop_run_once(r->loop, LLMCB_FOREVER);
    CHECK(turns < most);
    return llmcb_op_wait(op);
}

/* A request that must succeed. */
static void check_clean(rig *r, llmcb_chat *chat)
{
    llmcb_op *op = llmcb_chat_generate(chat, &question, 1, NULL);

    CHECK_INT(finish(r, op, 1000), LLMCB_OK);
    if (llmcb_op_result(op)->n_generations)
        CHECK_STR(llmcb_op_result(op)->generations[0].text.ptr, "clean");
    else
        TEST_FAIL("the clean request had no answer");
    llmcb_op_free(op);
}

static void run_row(const row *f, int transport, const bytes *b, bool trickle)
{
    server_script scripts[2];
    server_segment hold[1];
    llmcb_handler h[3], *callbacks[3];
    llmcb_chat_desc d;
    llmcb_config config;
    llmcb_chat *chat;
    llmcb_op *op;
    llmcb_code code, want = row_code(f, transport);
    const char *tokens = row_tokens(f, transport);
    seen s[3];
    rig r;
    size_t i, n_want = 0;

    memset(scripts, 0, sizeof scripts);
    scripts[0].bytes = b->p;
    scripts[0].len = b->len;
    scripts[0].end = f->end;
    scripts[0].trickle = trickle;
    scripts[1].bytes = CLEAN;
    scripts[1].end = SERVER_CLOSE;
    if (f->end == SERVER_RST && transport != REPLAY) {
        /* the reset must not overtake what the client has not read */
        hold[0].offset = b->len;
        hold[0].delay_ms = SERVER_HOLD;
        scripts[0].segments = hold;
        scripts[0].n_segments = 1;
    }
    rig_begin(&r, transport, scripts, 2);
    d = rig_desc(&r);
    d.n = f->n;
    chat = llmcb_chat_new(r.loop, &d);
    memset(s, 0, sizeof s);
    listen_sync(&h[0], &s[0], LLMCB_INLINE);
    listen_async(&h[1], &s[1]);
    listen_sync(&h[2], &s[2], 0);
    for (i = 0; i < 3; i++) callbacks[i] = &h[i];
    memset(&config, 0, sizeof config);
    config.callbacks = callbacks;
    config.n_callbacks = 3;

    op = llmcb_chat_generate(chat, &question, 1, &config);
    if (scripts[0].n_segments) {
        for (i = 0; tokens[i]; i++) n_want += tokens[i] == '|';
        /* what is known before the reset must be known without it */
        while ((want != LLMCB_EIO || s[0].n_tokens < n_want) &&
               !llmcb_op_done(op))
            llmcb_loop_run_once(r.loop, LLMCB_FOREVER);
        server_go(r.server);
    }
    code = finish(&r, op, b->len);
    CHECK_STR(llmcb_code_name(code), llmcb_code_name(want));
    CHECK_INT(llmcb_op_error(op)->code, code);
    check_no_canary(llmcb_op_error(op));
    for (i = 0; i < 3; i++) {
        check_shape(&s[i]);
        CHECK_INT(s[i].error.code, code);
        CHECK_INT(s[i].n_retry, 0);
        if (tokens) CHECK_STR(of(&s[i].tokens), tokens);
    }
    CHECK_INT(llmcb_op_result(op)->complete, code == LLMCB_OK);
    if (f->check && code == f->code)
        f->check(llmcb_op_result(op), llmcb_op_error(op));
    llmcb_op_free(op);
    for (i = 0; i < 3; i++) llmcb_loop_run_once(r.loop, 0);
    for (i = 0; i < 3; i++) CHECK_INT(s[i].n_after, 0);

    check_clean(&r, chat);
    if (r.server && (f->flags & NEW_CONN ||
                     (f->flags & SOCK_CONN && transport == SOCK))) {
        CHECK_INT(server_connections(r.server), 2);
        CHECK_INT(server_requests(r.server), 2);
        CHECK(server_wait_closed(r.server, 0) != SERVER_OPEN);
    }
    llmcb_chat_free(chat);
    rig_end(&r);
    for (i = 0; i < 3; i++) forget(&s[i]);
}

#if defined(__SANITIZE_THREAD__)
#define STRIDE 13 /* one thread only: there is little to find */
#else
#define STRIDE 1
#endif

/* All single splits, and byte by byte: the same tokens and the same end. */
static void run_splits(const row *f, const bytes *b)
{
    llmcb_segment *one =
        (llmcb_segment *)calloc(b->len + 1, sizeof *one), two[2];
    llmcb_recording rec;
    llmcb_replay_desc rd;
    rig r;
    size_t k;

    if (!one) abort();
    rig_loop(&r, true);
    memset(two, 0, sizeof two);
    memset(&rec, 0, sizeof rec);
    memset(&rd, 0, sizeof rd);
    rec.bytes = b->p;
    rec.len = b->len;
    rec.end = replay_end(f->end);
    rd.recordings = &rec;
    rd.n_recordings = 1;
    for (k = 0; k < b->len; k++) one[k].offset = k;
    for (k = 0; k < b->len && !test_failures_here; k += STRIDE) {
        llmcb_handler h, *callbacks[1];
        llmcb_chat_desc d;
        llmcb_chat *chat;
        llmcb_op *op;
        seen s;

        rec.segments = k ? two : one;
        rec.n_segments = k ? 2 : b->len;
        two[1].offset = k;
        memset(&s, 0, sizeof s);
        listen_sync(&h, &s, LLMCB_INLINE);
        callbacks[0] = &h;
        r.tr = llmcb_replay_new(r.loop, &rd);
        d = rig_desc(&r);
        d.n = f->n;
        d.callbacks = callbacks;
        d.n_callbacks = 1;
        chat = llmcb_chat_new(r.loop, &d);
        op = llmcb_chat_generate(chat, &question, 1, NULL);
        CHECK_STR(llmcb_code_name(finish(&r, op, b->len)),
                  llmcb_code_name(f->code));
        check_shape(&s);
        if (f->tokens) CHECK_STR(of(&s.tokens), f->tokens);
        if (f->check) f->check(llmcb_op_result(op), llmcb_op_error(op));
        if (test_failures_here)
            TEST_FAIL("that was with a split at %lu (0: every byte)",
                      (unsigned long)k);
        llmcb_op_free(op);
        llmcb_chat_free(chat);
        forget(&s);
    }
    rig_end(&r);
    free(one);
}

static void run_current(void)
{
    const char *name = test_current;
    size_t len = strlen(name), i;
    int t;

    for (t = 0; t < N_TRANSPORTS; t++) {
        size_t n = strlen(transport_names[t]);
        if (len > n && name[len - n - 1] == '_' &&
            strcmp(name + len - n, transport_names[t]) == 0)
            break;
    }
    for (i = 0; i < N_ROWS; i++) {
        char expect[96];
        bytes b;
        snprintf(expect, sizeof expect, "fault_%03d_%s_%s", rows[i].number,
                 rows[i].name, transport_names[t]);
        if (strcmp(expect, name) != 0) continue;
        b = make_row(&rows[i]);
        run_row(&rows[i], t, &b, false);
        if (!(rows[i].flags & BIG)) {
            if (t == REPLAY) run_splits(&rows[i], &b);
            else if (!(rows[i].flags & AT_ONCE) && !test_failures_here)
                run_row(&rows[i], t, &b, true);
        }
        free(b.p);
        return;
    }
    TEST_FAIL("no such row: %s", name);
}

/* One test a row and transport. */
__attribute__((constructor)) static void register_rows(void)
{
    static test_case cases[N_ROWS * N_TRANSPORTS];
    static char names[N_ROWS * N_TRANSPORTS][96];
    size_t i, n = 0;
    int t;

    for (i = 0; i < N_ROWS; i++)
        for (t = 0; t < N_TRANSPORTS; t++) {
#ifdef LLMCB_NO_CURL
            if (t == CURL_T) continue;
#endif
            if (t == CURL_T && rows[i].curl == CURL_NO) continue;
            snprintf(names[n], sizeof names[n], "fault_%03d_%s_%s",
                     rows[i].number, rows[i].name, transport_names[t]);
            cases[n].name = names[n];
            cases[n].run = run_current;
            test_add(&cases[n]);
            n++;
        }
}

/* ---- what needs more than a row ------------------------------------------ */

/* A rig, a chat with one inline handler, and its call. */
typedef struct talk {
    rig r;
    llmcb_handler h;
    llmcb_handler *callbacks[1];
    llmcb_chat_desc d;
    llmcb_chat *chat;
    llmcb_op *op;
    seen s;
} talk;

static void talk_begin(talk *t, int transport, const server_script *scripts,
                       size_t n)
{
    memset(t, 0, sizeof *t);
    rig_begin(&t->r, transport, scripts, n);
    listen_sync(&t->h, &t->s, LLMCB_INLINE);
    t->callbacks[0] = &t->h;
    t->d = rig_desc(&t->r);
    t->d.callbacks = t->callbacks;
    t->d.n_callbacks = 1;
}

static void talk_ask(talk *t)
{
    if (!t->chat) t->chat = llmcb_chat_new(t->r.loop, &t->d);
    llmcb_op_free(t->op);
    forget(&t->s);
    t->op = llmcb_chat_generate(t->chat, &question, 1, NULL);
}

static llmcb_code talk_wait(talk *t)
{
    llmcb_code code = llmcb_op_wait(t->op);

    check_shape(&t->s);
    CHECK_INT(t->s.error.code, code);
    check_no_canary(llmcb_op_error(t->op));
    return code;
}

static void talk_end(talk *t)
{
    llmcb_op_free(t->op);
    llmcb_chat_free(t->chat);
    rig_end(&t->r);
    forget(&t->s);
}

/* Turns the loop until the handler has n tokens. */
static void talk_until_tokens(talk *t, size_t n)
{
    while (t->s.n_tokens < n && !llmcb_op_done(t->op))
        llmcb_loop_run_once(t->r.loop, LLMCB_FOREVER);
    CHECK_INT(t->s.n_tokens, n);
}

static size_t script_set(server_script *s, size_t n, const char *bytes,
                         server_end end)
{
    memset(&s[n], 0, sizeof s[n]);
    s[n].bytes = bytes;
    s[n].end = end;
    return n + 1;
}

#ifdef LLMCB_NO_CURL
#define TEST_ON_CURL(name)
#else
#define TEST_ON_CURL(name) \
    TEST(name##_curl) { name(CURL_T); }
#endif
#define TEST_ON_NET(name)                \
    static void name(int transport);     \
    TEST(name##_sock) { name(SOCK); }    \
    TEST_ON_CURL(name)                   \
    static void name(int transport)

#define KEPT SSE "Content-Length: 74\r\n\r\n" EV("kept") DONE

/* A kept connection that dies with the next request: once more, silently. */
static void reused(int transport, server_end end)
{
    server_script s[3];
    talk t;

    script_set(s, 0, KEPT, SERVER_KEEP);
    script_set(s, 1, "", end);
    script_set(s, 2, CLEAN, SERVER_CLOSE);
    talk_begin(&t, transport, s, 3);
    talk_ask(&t);
    CHECK_INT(talk_wait(&t), LLMCB_OK);
    CHECK_STR(of(&t.s.tokens), "kept|");
    talk_ask(&t);
    CHECK_INT(talk_wait(&t), LLMCB_OK);
    CHECK_STR(of(&t.s.tokens), "clean|");
    CHECK_INT(t.s.n_retry, 0);
    CHECK_INT(server_requests(t.r.server), 3);
    CHECK_INT(server_connections(t.r.server), 2);
    if (server_requests(t.r.server) == 3) {
        CHECK_INT(server_request(t.r.server, 1)->conn, 0);
        CHECK_INT(server_request(t.r.server, 2)->conn, 1);
    }
    talk_end(&t);
}

TEST_ON_NET(fault_013_reused_closed)
{
    reused(transport, SERVER_CLOSE);
}

TEST_ON_NET(fault_013_reused_reset)
{
    reused(transport, SERVER_RST);
}

/* ... exactly once: when the new connection dies too, it is an error. */
TEST_ON_NET(fault_013_reused_once)
{
    server_script s[2];
    talk t;

    script_set(s, 0, KEPT, SERVER_KEEP);
    script_set(s, 1, "", SERVER_CLOSE);
    talk_begin(&t, transport, s, 2);
    talk_ask(&t);
    CHECK_INT(talk_wait(&t), LLMCB_OK);
    talk_ask(&t);
    CHECK_INT(talk_wait(&t), LLMCB_EIO);
    CHECK_INT(server_requests(t.r.server), 3);
    talk_end(&t);
}

/* A kept connection that dies in the middle of the answer is not replayed. */
TEST_ON_NET(fault_013_reused_began)
{
    server_script s[2];
    talk t;

    script_set(s, 0, KEPT, SERVER_KEEP);
    script_set(s, 1, "HTTP/1.1 200 OK\r\nConte", SERVER_CLOSE);
    talk_begin(&t, transport, s, 2);
    talk_ask(&t);
    CHECK_INT(talk_wait(&t), LLMCB_OK);
    talk_ask(&t);
    CHECK_INT(talk_wait(&t), LLMCB_ETRUNCATED);
    CHECK_INT(server_requests(t.r.server), 2);
    talk_end(&t);
}

/* The virtual clock stands in for the server's slowness. */
TEST(fault_024_header_trickle_replay)
{
    static const char head[] = SSE "X-A: a\r\n\r\n" ALL;
    server_segment segs[60];
    server_script s[2];
    talk t;
    size_t i;

    for (i = 0; i < 60; i++) {
        segs[i].offset = i;
        segs[i].delay_ms = 1000;
    }
    script_set(s, 0, head, SERVER_KEEP);
    s[0].segments = segs;
    s[0].n_segments = 60;
    script_set(s, 1, CLEAN, SERVER_CLOSE);
    talk_begin(&t, REPLAY, s, 2);
    t.d.first_byte_ms = 5000;
    talk_ask(&t);
    CHECK_INT(talk_wait(&t), LLMCB_ETIMEDOUT);
    CHECK_INT(t.s.error.detail, LLMCB_DETAIL_FIRST_BYTE);
    CHECK_INT(llmcb_loop_now(t.r.loop), 5000);
    CHECK_STR(of(&t.s.tokens), "");
    check_clean(&t.r, t.chat);
    talk_end(&t);
}

/* An error text that is cut in the middle of an echoed key. */
TEST(fault_030_key_echoed_and_cut_replay)
{
    size_t pad;

    for (pad = 0; pad < 260; pad++) {
        server_script s[1];
        bytes b = { NULL, 0, 0 };
        talk t;

        puts_to(&b, "HTTP/1.1 403 Forbidden\r\nX-Request-Id: ");
        fill(&b, 'r', pad);
        puts_to(&b, KEY "\r\n\r\n{\"error\":{\"message\":\"");
        fill(&b, 'm', pad);
        puts_to(&b, KEY "\",\"type\":\"");
        fill(&b, 't', pad);
        puts_to(&b, KEY "\",\"code\":\"");
        fill(&b, 'c', pad);
        puts_to(&b, KEY "\"}}");
        script_set(s, 0, b.p, SERVER_CLOSE);
        talk_begin(&t, REPLAY, s, 1);
        talk_ask(&t);
        CHECK_INT(talk_wait(&t), LLMCB_EHTTP);
        talk_end(&t);
        free(b.p);
    }
}

/* The target of a redirect hears nothing. */
TEST_ON_NET(fault_029_second_server)
{
    static const int statuses[] = { 301, 302, 303, 307, 308 };
    server_script s[2], other;
    char bytes[256];
    server *second;
    talk t;
    size_t i;

    script_set(&other, 0, CLEAN, SERVER_CLOSE);
    second = server_start(&other, 1);
    REQUIRE(second);
    for (i = 0; i < sizeof statuses / sizeof *statuses; i++) {
        snprintf(bytes, sizeof bytes,
                 "HTTP/1.1 %d Moved\r\nLocation: %s/chat/completions\r\n"
                 "Content-Length: 0\r\n\r\n",
                 statuses[i], server_base(second));
        script_set(s, 0, bytes, SERVER_KEEP);
        script_set(s, 1, CLEAN, SERVER_CLOSE);
        talk_begin(&t, transport, s, 2);
        t.d.max_retries = 2;
        talk_ask(&t);
        CHECK_INT(talk_wait(&t), LLMCB_EREDIRECT);
        CHECK_INT(t.s.error.http_status, statuses[i]);
        CHECK_INT(server_requests(t.r.server), 1);
        CHECK_INT(server_connections(second), 0);
        check_clean(&t.r, t.chat);
        talk_end(&t);
    }
    server_stop(second);
}

/* -- C: retries, on the virtual clock */

typedef struct retry_row {
    const char *name;
    const char *first; /* the answer that fails */
    int64_t low, high; /* the delay; high < 0: there is no retry */
    llmcb_code code;   /* then */
} retry_row;

#define FAIL(status, fields) \
    "HTTP/1.1 " status " X\r\n" fields "Content-Length: 0\r\n\r\n"
#define DIGITS "99999999999999999999999999999999999999999999999999999999999999"
#define NO_RETRY 0, -1, LLMCB_EHTTP
#define BACK_OFF 376, 500, LLMCB_OK

static const retry_row retry_rows[] = {
    { "032 seconds", FAIL("429", "Retry-After: 1\r\n"), 1000, 1000,
      LLMCB_OK },
    { "034 ms", FAIL("429", "retry-after-ms: 250\r\nRetry-After: 9\r\n"), 250,
      250, LLMCB_OK },
    { "034 ms wins, behind", FAIL("429", "Retry-After: 9\r\n"
                                         "retry-after-ms: 250\r\n"),
      250, 250, LLMCB_OK },
    { "034 ms fraction", FAIL("429", "retry-after-ms: 250.7\r\n"), 250, 251,
      LLMCB_OK },
    { "034 zero ms", FAIL("429", "retry-after-ms: 0\r\n"), 0, 0, LLMCB_OK },
    { "034 zero", FAIL("429", "Retry-After: 0\r\n"), 0, 0, LLMCB_OK },
    { "034 half", FAIL("429", "Retry-After: 0.5\r\n"), 500, 500, LLMCB_OK },
    { "035 cap", FAIL("429", "Retry-After: 120\r\n"), 120000, 120000,
      LLMCB_OK },
    { "035 above cap", FAIL("429", "Retry-After: 121\r\n"), NO_RETRY },
    { "035 ms above cap", FAIL("429", "retry-after-ms: 120001\r\n"),
      NO_RETRY },
    { "035 epoch", FAIL("429", "Retry-After: 1771404540\r\n"), NO_RETRY },
    { "035 digits", FAIL("429", "Retry-After: " DIGITS DIGITS DIGITS DIGITS
                                "\r\n"),
      NO_RETRY },
    { "035 negative", FAIL("429", "Retry-After: -5\r\n"), BACK_OFF },
    { "035 NaN", FAIL("429", "Retry-After: NaN\r\n"), BACK_OFF },
    { "035 exponent", FAIL("429", "Retry-After: 1e400\r\n"), BACK_OFF },
    { "035 empty", FAIL("429", "Retry-After:\r\n"), BACK_OFF },
    { "035 junk date", FAIL("429", "Retry-After: Foo, 99 Bar 2099 99:99:99 "
                                   "GMT\r\n"),
      BACK_OFF },
    { "033 past date", FAIL("429", "Retry-After: Tue, 14 Nov 2023 22:13:20 "
                                   "GMT\r\n"),
      0, 0, LLMCB_OK },
    { "033 far date", FAIL("429", "Retry-After: Sat, 14 Nov 2093 22:13:20 "
                                  "GMT\r\n"),
      NO_RETRY },
    { "036 500", FAIL("500", ""), BACK_OFF },
    { "036 502 html", "HTTP/1.1 502 X\r\nContent-Type: text/html\r\n"
                      "Content-Length: 6\r\n\r\n<html>",
      BACK_OFF },
    { "036 503", FAIL("503", ""), BACK_OFF },
    { "036 504", FAIL("504", ""), BACK_OFF },
    { "040 408", FAIL("408", ""), BACK_OFF },
    { "040 409", FAIL("409", ""), BACK_OFF },
    { "040 400", FAIL("400", ""), NO_RETRY },
    { "040 401", FAIL("401", ""), NO_RETRY },
    { "040 403", FAIL("403", ""), NO_RETRY },
    { "040 404", FAIL("404", ""), NO_RETRY },
    { "040 422", FAIL("422", ""), NO_RETRY },
    { "040 retry 400", FAIL("400", "x-should-retry: true\r\n"), BACK_OFF },
    { "040 do not retry 500", FAIL("500", "x-should-retry: false\r\n"),
      NO_RETRY },
    { "040 odd wish", FAIL("500", "x-should-retry: maybe\r\n"), BACK_OFF },
    { "011 no answer", "", BACK_OFF },
    { "014 bad status line", "HTTP/1.1 20", 0, -1, LLMCB_EPROTO },
    { "015 head cut", "HTTP/1.1 200 OK\r\nA", 0, -1, LLMCB_ETRUNCATED },
    { "025 html", "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<", 0,
      -1, LLMCB_ECTYPE },
    { "026 error in 200", "HTTP/1.1 200 OK\r\n\r\n{\"error\":\"x\"}", 0, -1,
      LLMCB_EAPI },
    { "028 empty", "HTTP/1.1 200 OK\r\n\r\n", 0, -1, LLMCB_ETRUNCATED },
};

TEST(fault_032_to_040_retries_replay)
{
    size_t i;

    for (i = 0; i < sizeof retry_rows / sizeof *retry_rows; i++) {
        const retry_row *f = &retry_rows[i];
        int before = test_failures_here;
        server_script s[2];
        talk t;

        script_set(s, 0, f->first, SERVER_CLOSE);
        script_set(s, 1, CLEAN, SERVER_CLOSE);
        talk_begin(&t, REPLAY, s, 2);
        t.d.max_retries = 2;
        talk_ask(&t);
        CHECK_STR(llmcb_code_name(talk_wait(&t)), llmcb_code_name(f->code));
        CHECK_INT(t.s.n_retry, f->high >= 0);
        if (f->high >= 0) {
            CHECK(t.s.delay[0] >= f->low && t.s.delay[0] <= f->high);
            /* the virtual clock's 0 is no time that can be due */
            CHECK_INT(llmcb_loop_now(t.r.loop),
                      t.s.delay[0] ? t.s.delay[0] : 1);
            CHECK_INT(t.s.attempt[0], 1);
            CHECK_STR(of(&t.s.tokens), "clean|");
        } else {
            CHECK_INT(llmcb_loop_now(t.r.loop), 0);
            CHECK_INT(llmcb_op_error(t.op)->attempt, 1);
            check_clean(&t.r, t.chat);
        }
        talk_end(&t);
        if (test_failures_here != before)
            TEST_FAIL("in retry row \"%s\"", f->name);
    }
}

/* Over the wire there is no virtual clock, but "at once" is no time. */
TEST_ON_NET(fault_034_retry_at_once)
{
    server_script s[3];
    talk t;
    char one[128], two[128];

    script_set(s, 0, FAIL("429", "retry-after-ms: 0\r\n"), SERVER_KEEP);
    script_set(s, 1, FAIL("503", "retry-after-ms: 0\r\n"), SERVER_CLOSE);
    script_set(s, 2, CLEAN, SERVER_CLOSE);
    talk_begin(&t, transport, s, 3);
    t.d.max_retries = 2;
    talk_ask(&t);
    CHECK_INT(talk_wait(&t), LLMCB_OK);
    CHECK_STR(of(&t.s.tokens), "clean|");
    CHECK_INT(t.s.n_retry, 2);
    CHECK_INT(t.s.status[0], 429);
    CHECK_INT(t.s.status[1], 503);
    CHECK_INT(t.s.attempt[1], 2);
    REQUIRE(server_requests(t.r.server) == 3);
    CHECK(server_header(server_request(t.r.server, 0), "Idempotency-Key", one,
                        sizeof one));
    CHECK(server_header(server_request(t.r.server, 2), "Idempotency-Key", two,
                        sizeof two));
    CHECK_STR(one, two);
    CHECK_STR(server_request(t.r.server, 0)->body,
              server_request(t.r.server, 2)->body);
    talk_end(&t);
}

TEST(fault_033_date_replay)
{
    server_script s[2];
    char bytes[200], date[40];
    time_t at = time(NULL) + 90;
    struct tm tm;
    talk t;

    gmtime_r(&at, &tm);
    strftime(date, sizeof date, "%a, %d %b %Y %H:%M:%S GMT", &tm);
    snprintf(bytes, sizeof bytes, FAIL("429", "Retry-After: %s\r\n"), date);
    script_set(s, 0, bytes, SERVER_KEEP);
    script_set(s, 1, CLEAN, SERVER_CLOSE);
    talk_begin(&t, REPLAY, s, 2);
    t.d.max_retries = 1;
    talk_ask(&t);
    CHECK_INT(talk_wait(&t), LLMCB_OK);
    CHECK_INT(t.s.n_retry, 1);
    /* rounded up to seconds; the wall clock went on a little */
    CHECK(t.s.delay[0] > 30000 && t.s.delay[0] <= 90000);
    CHECK_INT(t.s.delay[0] % 1000, 0);
    talk_end(&t);
}

TEST(fault_036_back_off_grows_replay)
{
    static const int64_t high[] = { 500, 1000, 2000, 4000, 8000, 8000, 8000 };
    server_script s[8];
    talk t;
    size_t i;

    for (i = 0; i < 7; i++) script_set(s, i, FAIL("500", ""), SERVER_KEEP);
    script_set(s, 7, CLEAN, SERVER_CLOSE);
    talk_begin(&t, REPLAY, s, 8);
    t.d.max_retries = 7;
    talk_ask(&t);
    CHECK_INT(talk_wait(&t), LLMCB_OK);
    CHECK_INT(t.s.n_retry, 7);
    for (i = 0; i < 7; i++) {
        CHECK(t.s.delay[i] > high[i] * 3 / 4 && t.s.delay[i] <= high[i]);
        CHECK_INT(t.s.attempt[i], i + 1);
        CHECK_INT(t.s.status[i], 500);
        CHECK_INT(t.s.tokens_at_retry[i], 0);
    }
    talk_end(&t);
}

TEST(fault_037_exhausted_replay)
{
    server_script s[4];
    talk t;

    script_set(s, 0, FAIL("500", ""), SERVER_KEEP);
    script_set(s, 1, FAIL("502", ""), SERVER_KEEP);
    script_set(s, 2, FAIL("503", ""), SERVER_KEEP);
    script_set(s, 3, CLEAN, SERVER_CLOSE);
    talk_begin(&t, REPLAY, s, 4); /* max_retries: the default */
    t.d.max_retries = 0;
    talk_ask(&t);
    CHECK_INT(talk_wait(&t), LLMCB_EHTTP);
    CHECK_INT(t.s.error.http_status, 503);
    CHECK_INT(t.s.error.attempt, 3);
    CHECK_INT(t.s.n_retry, 2);
    check_clean(&t.r, t.chat);
    talk_end(&t);
}

/* Refused connections are retried too, and said to be that. */
TEST(fault_037_refused_sock)
{
    server_script s[1];
    talk t;
    char base[64];
    struct sockaddr_in a;
    socklen_t len = sizeof a;
    int fd = socket(AF_INET, SOCK_STREAM, 0);

    /* a port that is bound but not listened at */
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    REQUIRE(bind(fd, (struct sockaddr *)&a, sizeof a) == 0);
    REQUIRE(getsockname(fd, (struct sockaddr *)&a, &len) == 0);
    snprintf(base, sizeof base, "http://127.0.0.1:%d/v1", ntohs(a.sin_port));
    script_set(s, 0, CLEAN, SERVER_CLOSE);
    talk_begin(&t, SOCK, s, 1);
    t.d.base_url = base;
    talk_ask(&t);
    CHECK_INT(talk_wait(&t), LLMCB_ECONNECT);
    CHECK_INT(t.s.error.sys_errno, ECONNREFUSED);
    talk_end(&t);
    close(fd);
}

TEST(fault_038_cancel_in_back_off_replay)
{
    server_script s[2];
    talk t;

    script_set(s, 0, FAIL("429", "Retry-After: 60\r\n"), SERVER_KEEP);
    script_set(s, 1, CLEAN, SERVER_CLOSE);
    talk_begin(&t, REPLAY, s, 2);
    t.d.max_retries = 2;
    talk_ask(&t);
    while (!t.s.n_retry && !llmcb_op_done(t.op))
        llmcb_loop_run_once(t.r.loop, 0);
    llmcb_op_cancel(t.op);
    CHECK_INT(talk_wait(&t), LLMCB_ECANCELLED);
    CHECK_INT(t.s.error.detail, LLMCB_DETAIL_CALLER);
    CHECK_INT(llmcb_loop_now(t.r.loop), 0);
    check_clean(&t.r, t.chat);
    talk_end(&t);
}

/* Whatever ends it: no retry once a byte of the answer has come. */
TEST(fault_039_after_first_byte_replay)
{
    static const struct {
        const char *bytes;
        server_end end;
        llmcb_code code;
        const char *tokens;
    } cases[] = {
        { CHUNKED "50\r\n" EV("Hel"), SERVER_RST, LLMCB_EIO, "Hel|" },
        { CHUNKED "50\r\n" EV("Hel"), SERVER_CLOSE, LLMCB_ETRUNCATED,
          "Hel|" },
        { CHUNKED "50\r\n:", SERVER_RST, LLMCB_EIO, "" },
        { CHUNKED "50\r\n" EV("Hel"), SERVER_KEEP, LLMCB_ETIMEDOUT, "Hel|" }
    };
    size_t i;

    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        server_script s[2];
        talk t;

        script_set(s, 0, cases[i].bytes, cases[i].end);
        script_set(s, 1, CLEAN, SERVER_CLOSE);
        talk_begin(&t, REPLAY, s, 2);
        t.d.max_retries = 5;
        talk_ask(&t);
        CHECK_INT(talk_wait(&t), cases[i].code);
        CHECK_INT(t.s.n_retry, 0);
        CHECK_STR(of(&t.s.tokens), cases[i].tokens);
        check_clean(&t.r, t.chat);
        talk_end(&t);
    }
}

/* 100 calls that all fail: each keeps to its own number of tries. */
TEST(fault_041_no_storm_sock)
{
    server_script s[1];
    llmcb_op *ops[100];
    talk t;
    size_t i;

    script_set(s, 0, FAIL("500", "retry-after-ms: 0\r\n"), SERVER_KEEP);
    talk_begin(&t, SOCK, s, 1);
    t.d.max_retries = 2;
    t.d.n_callbacks = 0;
    t.chat = llmcb_chat_new(t.r.loop, &t.d);
    for (i = 0; i < 100; i++)
        ops[i] = llmcb_chat_generate(t.chat, &question, 1, NULL);
    CHECK_INT(llmcb_loop_run(t.r.loop), LLMCB_OK);
    for (i = 0; i < 100; i++) {
        CHECK_INT(llmcb_op_code(ops[i]), LLMCB_EHTTP);
        CHECK_INT(llmcb_op_error(ops[i])->attempt, 3);
        llmcb_op_free(ops[i]);
    }
    CHECK_INT(server_requests(t.r.server), 300);
    talk_end(&t);
}

/* -- D and E */

/* What comes behind a response, later, answers nobody's request. */
TEST_ON_NET(fault_066_late_surplus)
{
    static const char first[] = KEPT;
    server_segment hold;
    server_script s[2];
    bytes b = { NULL, 0, 0 };
    talk t;

    puts_to(&b, first);
    hold.offset = b.len;
    hold.delay_ms = SERVER_HOLD;
    puts_to(&b, SSE "Content-Length: 74\r\n\r\n" EV("evil") DONE);
    script_set(s, 0, b.p, SERVER_KEEP);
    s[0].segments = &hold;
    s[0].n_segments = 1;
    script_set(s, 1, CLEAN, SERVER_CLOSE);
    talk_begin(&t, transport, s, 2);
    talk_ask(&t);
    CHECK_INT(talk_wait(&t), LLMCB_OK);
    CHECK_STR(of(&t.s.tokens), "kept|");
    server_go(t.r.server);
    CHECK(server_wait_sent(t.r.server, 1));
    talk_ask(&t);
    CHECK_INT(talk_wait(&t), LLMCB_OK);
    CHECK_STR(of(&t.s.tokens), "clean|");
    CHECK_INT(server_connections(t.r.server), 2);
    talk_end(&t);
    free(b.p);
}

/* HTTP/2 is never asked for in clear text, nor is an encoding. */
TEST_ON_NET(fault_067_no_upgrade)
{
    server_script s[1];
    talk t;
    char v[64];

    script_set(s, 0, CLEAN, SERVER_CLOSE);
    talk_begin(&t, transport, s, 1);
    t.d.http2 = true;
    talk_ask(&t);
    CHECK_INT(talk_wait(&t), LLMCB_OK);
    REQUIRE(server_requests(t.r.server) == 1);
    CHECK(strstr(server_request(t.r.server, 0)->head, " HTTP/1.1\r\n"));
    CHECK(!server_header(server_request(t.r.server, 0), "Upgrade", v,
                         sizeof v));
    CHECK(!server_header(server_request(t.r.server, 0), "HTTP2-Settings", v,
                         sizeof v));
    CHECK(!server_header(server_request(t.r.server, 0), "Accept-Encoding", v,
                         sizeof v) ||
          strcmp(v, "identity") == 0);
    talk_end(&t);
}

/* A CR at the end of a read ends the line without waiting for an LF. */
TEST_ON_NET(fault_069_cr_at_end_of_read)
{
    static const char first[] =
        SSE "\r\ndata: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\r\r";
    server_segment holds[2];
    server_script s[1];
    bytes b = { NULL, 0, 0 };
    talk t;

    puts_to(&b, first);
    holds[0].offset = b.len;
    holds[0].delay_ms = SERVER_HOLD;
    puts_to(&b, "\ndata: {\"choices\":[{\"delta\":{\"content\":\"b\"}}]}\r\n"
                "\r");
    holds[1].offset = b.len;
    holds[1].delay_ms = SERVER_HOLD;
    puts_to(&b, "\n" MORE);
    script_set(s, 0, b.p, SERVER_CLOSE);
    s[0].segments = holds;
    s[0].n_segments = 2;
    talk_begin(&t, transport, s, 1);
    talk_ask(&t);
    talk_until_tokens(&t, 1);
    server_go(t.r.server);
    talk_until_tokens(&t, 2);
    server_go(t.r.server);
    CHECK_INT(talk_wait(&t), LLMCB_OK);
    CHECK_STR(of(&t.s.tokens), "a|b||");
    talk_end(&t);
    free(b.p);
}

/* Tokens are told when they come, not when the stream ends. */
TEST_ON_NET(fault_068_live)
{
    server_segment holds[2];
    server_script s[1];
    talk t;

    script_set(s, 0, SSE "\r\n" ALL, SERVER_CLOSE);
    holds[0].offset = strlen(SSE "\r\n" EV("Hel"));
    holds[1].offset = strlen(SSE "\r\n" TWO);
    holds[0].delay_ms = holds[1].delay_ms = SERVER_HOLD;
    s[0].segments = holds;
    s[0].n_segments = 2;
    talk_begin(&t, transport, s, 1);
    talk_ask(&t);
    talk_until_tokens(&t, 1);
    server_go(t.r.server);
    talk_until_tokens(&t, 2);
    server_go(t.r.server);
    CHECK_INT(talk_wait(&t), LLMCB_OK);
    CHECK_STR(of(&t.s.tokens), ALL_TOKENS);
    talk_end(&t);
}

/* Every pair of splits of a short stream. */
TEST(fault_068_pairs_replay)
{
    static const char b[] =
        OK "\r\n" BOM "data:{\"choices\":[{\"delta\":{\"content\":"
                      "\"\\ud83d\\ude00\xC3\xA9\"}}]}\r\n\r\n:c\r\r"
                      "data:[DONE]\n\n";
    llmcb_recording rec;
    llmcb_replay_desc rd;
    llmcb_segment segs[3];
    rig r;
    size_t i, k, len = sizeof b - 1;

    memset(&rec, 0, sizeof rec);
    memset(&rd, 0, sizeof rd);
    memset(segs, 0, sizeof segs);
    rec.bytes = b;
    rec.len = len;
    rec.segments = segs;
    rec.n_segments = 3;
    rd.recordings = &rec;
    rd.n_recordings = 1;
    rig_loop(&r, true);
    for (i = 1; i < len && !test_failures_here; i += STRIDE)
        for (k = i; k < len && !test_failures_here; k += STRIDE) {
            llmcb_handler h, *callbacks[1];
            llmcb_chat_desc d;
            llmcb_chat *chat;
            llmcb_op *op;
            seen s;

            segs[1].offset = i;
            segs[2].offset = k;
            memset(&s, 0, sizeof s);
            listen_sync(&h, &s, LLMCB_INLINE);
            callbacks[0] = &h;
            r.tr = llmcb_replay_new(r.loop, &rd);
            d = rig_desc(&r);
            d.callbacks = callbacks;
            d.n_callbacks = 1;
            chat = llmcb_chat_new(r.loop, &d);
            op = llmcb_chat_generate(chat, &question, 1, NULL);
            CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
            CHECK_STR(of(&s.tokens), "\xF0\x9F\x98\x80\xC3\xA9|");
            if (test_failures_here)
                TEST_FAIL("that was with splits at %lu and %lu",
                          (unsigned long)i, (unsigned long)k);
            llmcb_op_free(op);
            llmcb_chat_free(chat);
            forget(&s);
        }
    rig_end(&r);
}

/* limits.event: a line, and an event of several lines, at it and above. */
TEST(fault_079_event_limit_replay)
{
    int over, lines;

    for (over = 0; over < 2; over++)
        for (lines = 0; lines < 2; lines++) {
            bytes b = { NULL, 0, 0 };
            server_script s[2];
            talk t;
            size_t cap = 4096;

            if (!lines) {
                make_line(&b, cap + (size_t)over);
            } else {
                /* two data lines that make cap bytes with the LF between */
                static const char a[] = "{\"choices\":[{\"delta\":{\"content\""
                                        ":\"",
                                  z[] = "\"}}]}";
                puts_to(&b, SSE "\r\n" EV("Hel") "data: {\"x\":1,\ndata: ");
                puts_to(&b, a + 1);
                fill(&b, 'y', cap + (size_t)over - strlen("{\"x\":1,\n") -
                                  strlen(a + 1) - strlen(z));
                puts_to(&b, z);
                puts_to(&b, "\n\n" FIN("stop") DONE);
            }
            script_set(s, 0, b.p, SERVER_CLOSE);
            script_set(s, 1, CLEAN, SERVER_CLOSE);
            talk_begin(&t, REPLAY, s, 2);
            t.d.limits.event = cap;
            talk_ask(&t);
            CHECK_INT(talk_wait(&t), over ? LLMCB_ELIMIT : LLMCB_OK);
            CHECK_INT(t.s.n_tokens, over ? 1 : 3);
            if (over) CHECK(strstr(t.s.error.message, "limits.event"));
            check_clean(&t.r, t.chat);
            talk_end(&t);
            free(b.p);
        }
}

TEST(fault_080_comments_for_ever_replay)
{
    enum { N = 60 };
    bytes b = { NULL, 0, 0 };
    server_segment segs[N];
    server_script s[2];
    talk t;
    size_t i;

    puts_to(&b, SSE "\r\n" EV("Hel"));
    for (i = 0; i < N; i++) {
        segs[i].offset = b.len;
        segs[i].delay_ms = 1000;
        puts_to(&b, i % 2 ? ": ping\n\n" : "event: ping\ndata:\n\n");
    }
    script_set(s, 0, b.p, SERVER_KEEP);
    s[0].segments = segs;
    s[0].n_segments = N;
    script_set(s, 1, CLEAN, SERVER_CLOSE);
    talk_begin(&t, REPLAY, s, 2);
    t.d.idle_ms = 10500;
    talk_ask(&t);
    CHECK_INT(talk_wait(&t), LLMCB_ETIMEDOUT);
    CHECK_INT(t.s.error.detail, LLMCB_DETAIL_IDLE);
    CHECK_INT(llmcb_loop_now(t.r.loop), 10500);
    CHECK_STR(of(&t.s.tokens), "Hel|");
    check_clean(&t.r, t.chat);
    talk_end(&t);
    free(b.p);
}

/* The end is at [DONE]; a server that then says nothing more is left. */
TEST_ON_NET(fault_081_done_then_open)
{
    static const char *const heads[] = { CHUNKED "1000\r\n",
                                         SSE "Content-Length: 9999\r\n\r\n",
                                         SSE "\r\n" };
    size_t i;

    for (i = 0; i < 3; i++) {
        bytes b = { NULL, 0, 0 };
        server_script s[2];
        talk t;

        puts_to(&b, heads[i]);
        puts_to(&b, ALL);
        script_set(s, 0, b.p, SERVER_STALL);
        script_set(s, 1, CLEAN, SERVER_CLOSE);
        talk_begin(&t, transport, s, 2);
        talk_ask(&t);
        CHECK_INT(talk_wait(&t), LLMCB_OK);
        CHECK_STR(of(&t.s.tokens), ALL_TOKENS);
        check_clean(&t.r, t.chat); /* not on that connection */
        CHECK_INT(server_connections(t.r.server), 2);
        /* the linger timer needs a loop that turns */
        while (server_is_closed(t.r.server, 0) == SERVER_OPEN &&
               server_now(t.r.server) < SERVER_WAIT_MS)
            llmcb_loop_run_once(t.r.loop, 20);
        CHECK(server_is_closed(t.r.server, 0) != SERVER_OPEN);
        talk_end(&t);
        free(b.p);
    }
}

/* ... and one that ends its response is used again. */
TEST_ON_NET(fault_081_done_then_reused)
{
    server_script s[2];
    bytes b = { NULL, 0, 0 };
    server_segment hold;
    talk t;

    puts_to(&b, CHUNKED);
    frame_body(&b, ALL, false);
    hold.offset = b.len;
    hold.delay_ms = SERVER_HOLD;
    puts_to(&b, "0\r\n\r\n");
    script_set(s, 0, b.p, SERVER_KEEP);
    s[0].segments = &hold;
    s[0].n_segments = 1;
    script_set(s, 1, CLEAN, SERVER_CLOSE);
    talk_begin(&t, transport, s, 2);
    talk_ask(&t);
    CHECK_INT(talk_wait(&t), LLMCB_OK); /* without the last chunk */
    server_go(t.r.server);
    CHECK(server_wait_sent(t.r.server, 1));
    llmcb_loop_run_once(t.r.loop, 0);
    llmcb_loop_run_once(t.r.loop, 0);
    check_clean(&t.r, t.chat);
    CHECK_INT(server_connections(t.r.server), 1);
    talk_end(&t);
    free(b.p);
}

/* ---- cancel -------------------------------------------------------------- */

/* The server notices, the tokens before it stand. */
TEST_ON_NET(fault_098_cancel_while_stalled)
{
    server_script s[2];
    talk t;

    script_set(s, 0, SSE "\r\n" TWO, SERVER_STALL);
    script_set(s, 1, CLEAN, SERVER_CLOSE);
    talk_begin(&t, transport, s, 2);
    talk_ask(&t);
    talk_until_tokens(&t, 2);
    llmcb_op_cancel(t.op);
    CHECK_INT(talk_wait(&t), LLMCB_ECANCELLED);
    CHECK_STR(of(&t.s.tokens), TWO_TOKENS);
    CHECK(server_wait_closed(t.r.server, 0) != SERVER_OPEN);
    llmcb_op_cancel(t.op); /* late: nothing */
    check_clean(&t.r, t.chat);
    CHECK_INT(t.s.n_error, 1);
    talk_end(&t);
}

TEST_ON_NET(fault_098_cancel_before_answer)
{
    server_script s[2];
    talk t;

    script_set(s, 0, "", SERVER_STALL);
    script_set(s, 1, CLEAN, SERVER_CLOSE);
    talk_begin(&t, transport, s, 2);
    talk_ask(&t);
    while (server_requests(t.r.server) == 0 && !llmcb_op_done(t.op))
        llmcb_loop_run_once(t.r.loop, 1);
    llmcb_op_cancel(t.op);
    CHECK_INT(talk_wait(&t), LLMCB_ECANCELLED);
    CHECK(server_wait_closed(t.r.server, 0) != SERVER_OPEN);
    check_clean(&t.r, t.chat);
    talk_end(&t);
}

/* Freeing the operation is a cancel too: the handlers are told. */
TEST_ON_NET(fault_098_free_while_stalled)
{
    server_script s[2];
    talk t;

    script_set(s, 0, SSE "\r\n" TWO, SERVER_STALL);
    script_set(s, 1, CLEAN, SERVER_CLOSE);
    talk_begin(&t, transport, s, 2);
    talk_ask(&t);
    talk_until_tokens(&t, 2);
    llmcb_op_free(t.op);
    t.op = NULL;
    while (!t.s.n_error) llmcb_loop_run_once(t.r.loop, LLMCB_FOREVER);
    check_shape(&t.s);
    CHECK_INT(t.s.error.code, LLMCB_ECANCELLED);
    CHECK_INT(t.s.error.detail, LLMCB_DETAIL_CONSUMER);
    CHECK(server_wait_closed(t.r.server, 0) != SERVER_OPEN);
    check_clean(&t.r, t.chat);
    talk_end(&t);
}

/* ---- credentials --------------------------------------------------------- */

/* Refused before anything ran: the chat says so, and so does every call. */
static void check_refused(const llmcb_chat_desc *d, const char *secret)
{
    server_script s[1];
    llmcb_prompt prompt;
    llmcb_chat_desc mine = *d;
    llmcb_chat *chat;
    llmcb_op *ops[3];
    size_t i;
    talk t;

    script_set(s, 0, CLEAN, SERVER_CLOSE);
    talk_begin(&t, SOCK, s, 1);
    mine.transport = t.r.tr;
    if (!mine.base_url) mine.base_url = server_base(t.r.server);
    mine.callbacks = t.callbacks;
    mine.n_callbacks = 1;
    chat = llmcb_chat_new(t.r.loop, &mine);
    REQUIRE(chat);
    CHECK_INT(llmcb_chat_error(chat)->code, LLMCB_EINVAL);
    CHECK(!strstr(llmcb_chat_error(chat)->message, secret));
    prompt.messages = &question;
    prompt.n = 1;
    ops[0] = llmcb_chat_generate(chat, &question, 1, NULL);
    ops[1] = llmcb_chat_stream(chat, &question, 1, NULL);
    ops[2] = llmcb_chat_batch(chat, &prompt, 1, NULL);
    for (i = 0; i < 3; i++) {
        CHECK_INT(llmcb_op_wait(ops[i]), LLMCB_EINVAL);
        CHECK_STR(llmcb_op_error(ops[i])->message,
                  llmcb_chat_error(chat)->message);
        llmcb_op_free(ops[i]);
    }
    CHECK_INT(t.s.n_start + t.s.n_error, 0);
    CHECK_INT(server_connections(t.r.server), 0);
    llmcb_chat_free(chat);
    talk_end(&t);
}

TEST(header_injection_is_refused)
{
    static const char *const bad[] = {
        "sk-secret\r\nX-Evil: 1", "sk-secret\n", "sk-secret\r", "\nsk-secret",
        "sk-sec ret",  " sk-secret",  "sk-secret ", "sk-secret\x01",
        "sk-secret\x7F", "sk-secret\x80", "sk-secret\t", "sk-secr\xC3\xA9t"
    };
    llmcb_chat_desc d;
    llmcb_pair header;
    bytes big = { NULL, 0, 0 };
    size_t i;

    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        int before = test_failures_here;
        memset(&d, 0, sizeof d);
        d.api_key = bad[i];
        check_refused(&d, "secr");
        memset(&d, 0, sizeof d);
        d.api_key = KEY;
        d.organization = bad[i];
        check_refused(&d, "secr");
        if (before != test_failures_here)
            TEST_FAIL("that was value %lu", (unsigned long)i);
    }
    fill(&big, 'k', 1000000);
    memset(&d, 0, sizeof d);
    d.api_key = big.p;
    check_refused(&d, "kkkk");
    d.api_key = KEY;
    d.organization = big.p;
    check_refused(&d, "kkkk");
    free(big.p);
    /* further headers: values may have blanks */
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        const char *c;
        bool control = false;
        for (c = bad[i]; *c; c++)
            if ((unsigned char)*c < 0x20 || *c == 0x7F) control = true;
        if (!control) continue;
        memset(&d, 0, sizeof d);
        d.api_key = KEY;
        header.key = "X-Mine";
        header.value = bad[i];
        d.headers = &header;
        d.n_headers = 1;
        check_refused(&d, "secr");
    }
    for (i = 0; i < 8; i++) {
        static const char *const names[] = { "X-A:", "X A", "X-A\r\nB", "",
                                             "Host", "content-length",
                                             "Transfer-Encoding", "X\x80" };
        memset(&d, 0, sizeof d);
        d.api_key = KEY;
        header.key = names[i];
        header.value = "secret";
        d.headers = &header;
        d.n_headers = 1;
        check_refused(&d, "secret");
    }
}

TEST(bad_addresses_are_refused)
{
    static const char *const bad[] = {
        "https://user:secret@127.0.0.1/v1", "http://secret@127.0.0.1/v1",
        "ftp://127.0.0.1/secret", "file:///secret", "127.0.0.1/secret", "",
        "http://127.0.0.1/v1\r\nX-Evil: secret", "http://127.0.0.1/sec ret",
        "http:///secret", "http://127.0.0.1:99999/secret",
        "http://127.0.0.1:0/secret", "http://127.0.0.1:x/secret",
        "http://127.0.0.1#secret", "http://[::1/secret", "unix:", "unix::/v1",
        "unix:/tmp/x:secret", "unix:/tmp/no-target"
    };
    size_t i;

    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        llmcb_chat_desc d;
        int before = test_failures_here;
        memset(&d, 0, sizeof d);
        d.api_key = KEY;
        d.base_url = bad[i];
        check_refused(&d, "secret");
        if (before != test_failures_here)
            TEST_FAIL("that was \"%s\"", bad[i]);
    }
}

/* A key goes out in clear text to this machine only, unless allowed. */
TEST(key_in_clear_text)
{
    static const struct {
        const char *url;
        bool ok;
    } cases[] = {
        { "http://example.com/v1", false },
        { "http://127.evil.example/v1", false },
        { "http://127.0.0.1.evil.example/v1", false },
        { "http://localhost.evil.example/v1", false },
        { "http://10.0.0.1/v1", false },
        { "http://0.0.0.0/v1", false },
        { "http://[2001:db8::1]/v1", false },
        { "HTTP://example.com/v1", false },
        { "http://127.0.0.1:8080/v1", true },
        { "http://127.1.2.3/v1", true },
        { "http://localhost/v1", true },
        { "http://LOCALHOST:1/v1", true },
        { "http://[::1]:8080/v1", true },
        { "unix:/run/x.sock:/v1", true },
        { "https://example.com/v1", true },
    };
    size_t i;
    rig r;

    rig_loop(&r, true);
    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        llmcb_chat_desc d;
        llmcb_chat *chat;
        int before = test_failures_here;

        memset(&d, 0, sizeof d);
        d.base_url = cases[i].url;
        d.api_key = KEY;
        chat = llmcb_chat_new(r.loop, &d);
        CHECK_INT(llmcb_chat_error(chat)->code,
                  cases[i].ok ? LLMCB_OK : LLMCB_EINVAL);
        llmcb_chat_free(chat);
        if (cases[i].url[0] == 'h') {
            d.allow_cleartext_key = true;
            chat = llmcb_chat_new(r.loop, &d);
            CHECK_INT(llmcb_chat_error(chat)->code, LLMCB_OK);
            llmcb_chat_free(chat);
            d.allow_cleartext_key = false;
            d.api_key = "";
            chat = llmcb_chat_new(r.loop, &d);
            CHECK_INT(llmcb_chat_error(chat)->code, LLMCB_OK);
            llmcb_chat_free(chat);
        }
        if (before != test_failures_here)
            TEST_FAIL("that was %s", cases[i].url);
    }
    rig_end(&r);
}

TEST(https_needs_libcurl)
{
    server_script s[1];
    talk t;

    script_set(s, 0, CLEAN, SERVER_CLOSE);
    talk_begin(&t, SOCK, s, 1);
    t.d.base_url = "https://127.0.0.1:1/v1";
    talk_ask(&t);
    CHECK_INT(talk_wait(&t), LLMCB_ETLS);
    CHECK(strstr(t.s.error.message, "LLMCB_NO_CURL"));
    CHECK_INT(t.s.n_retry, 0);
    talk_end(&t);
}

/* Row 110: what the environment says of proxies is nothing to a plain call. */
TEST_ON_NET(fault_110_proxy_environment)
{
    static const char *const names[] = { "http_proxy", "HTTP_PROXY",
                                         "all_proxy", "ALL_PROXY" };
    server_script s[1], other;
    server *proxy;
    size_t i;
    talk t;

    script_set(&other, 0, CLEAN, SERVER_CLOSE);
    proxy = server_start(&other, 1);
    REQUIRE(proxy);
    for (i = 0; i < 4; i++) setenv(names[i], server_base(proxy), 1);
    script_set(s, 0, CLEAN, SERVER_CLOSE);
    talk_begin(&t, transport, s, 1);
    talk_ask(&t);
    CHECK_INT(talk_wait(&t), LLMCB_OK);
    CHECK_INT(server_requests(t.r.server), 1);
    CHECK_INT(server_connections(proxy), 0);
    talk_end(&t);
    for (i = 0; i < 4; i++) unsetenv(names[i]);
    server_stop(proxy);
}

int main(int argc, char **argv)
{
    return test_main(argc, argv);
}

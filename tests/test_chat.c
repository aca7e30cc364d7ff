/* A chat call but for what a server may do wrong: the four time limits, the
 * environment, what goes over the wire, connections and their reuse, limits
 * at N and N + 1, the life of the key. Time is virtual wherever it matters,
 * with recordings in memory; the wire is the scripted server's. */
/* build: -DLLMCB_NO_AGENT */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include <netdb.h>

/* A resolver that knows a host with several addresses. */
static int test_getaddrinfo(const char *host, const char *port,
                            const struct addrinfo *hints,
                            struct addrinfo **found);
static void test_freeaddrinfo(struct addrinfo *list);
#define getaddrinfo(h, p, i, f) test_getaddrinfo(h, p, i, f)
#define freeaddrinfo(l) test_freeaddrinfo(l)
#define LLMCB_IMPLEMENTATION
#include "../llmcb.h"
#undef getaddrinfo
#undef freeaddrinfo
#include "test.h"
#include "server.h"

#define FIXTURES "tests/fixtures/"
#define KEY "sk-CANARY-4f1d9b7c2e"

static const llmcb_message question = { .role = LLMCB_USER,
                                        .content = "Tell me a joke" };

#define SSE "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
#define EV(t) \
    "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"" t "\"}}]}\n\n"
#define FIN \
    "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":" \
    "\"stop\"}]}\n\n"
#define DONE "data: [DONE]\n\n"
#define HELLO SSE "Connection: close\r\n\r\n" EV("Hel") EV("lo") FIN DONE
#define FAIL(status, fields) \
    "HTTP/1.1 " status " X\r\n" fields "Content-Length: 0\r\n\r\n"

/* ---- what a handler saw -------------------------------------------------- */

typedef struct seen {
    char tokens[4096]; /* each ended by a bar, as far as they fit */
    char params[2048];
    size_t n_start, n_tokens, n_retry, n_end, n_error;
    int64_t delay[4];
    llmcb_error error, retried;
    int64_t sleep; /* the async one sleeps so long at each token */
} seen;

static void note(seen *s, const llmcb_event *ev)
{
    size_t n = strlen(s->tokens);

    if (ev->kind == LLMCB_CHAT_MODEL_START) {
        s->n_start++;
        snprintf(s->params, sizeof s->params, "%s", ev->start->params.ptr);
    } else if (ev->kind == LLMCB_LLM_NEW_TOKEN) {
        s->n_tokens++;
        snprintf(s->tokens + n, sizeof s->tokens - n, "%s|",
                 ev->token->text.ptr);
    } else if (ev->kind == LLMCB_RETRY) {
        if (s->n_retry < 4) s->delay[s->n_retry] = ev->retry->delay_ms;
        s->n_retry++;
        s->retried = *ev->retry->error;
    } else if (ev->kind == LLMCB_LLM_END) {
        s->n_end++;
    } else if (ev->kind == LLMCB_LLM_ERROR) {
        s->n_error++;
        s->error = *ev->error;
    }
}

static int note_sync(llmcb_handler *h, const llmcb_event *ev)
{
    note((seen *)h->user, ev);
    return 0;
}

static llmcb_step note_slowly(llmcb_task *t, llmcb_handler *h,
                              const llmcb_event *ev)
{
    seen *s = (seen *)h->user;

    LLMCB_BEGIN(t);
    if (ev->kind == LLMCB_LLM_NEW_TOKEN && s->sleep)
        LLMCB_AWAIT(t, llmcb_sleep(t, s->sleep));
    note(s, ev);
    LLMCB_END(t);
}

typedef struct talk {
    llmcb_loop *loop;
    llmcb_transport *tr;
    server *server;
    llmcb_handler h;
    llmcb_handler *callbacks[1];
    llmcb_chat_desc d;
    llmcb_chat *chat;
    llmcb_op *op;
    seen s;
} talk;

static void talk_init(talk *t, bool virtual_clock)
{
    llmcb_loop_desc ld;

    memset(t, 0, sizeof *t);
    memset(&ld, 0, sizeof ld);
    ld.virtual_clock = virtual_clock;
    t->loop = llmcb_loop_new(&ld);
    if (!t->loop) abort();
    t->h.sync.on_chat_model_start = t->h.sync.on_llm_new_token =
        t->h.sync.on_llm_end = t->h.sync.on_llm_error = t->h.sync.on_retry =
            note_sync;
    t->h.flags = LLMCB_INLINE;
    t->h.user = &t->s;
    t->callbacks[0] = &t->h;
    t->d.api_key = KEY;
    t->d.model = "m";
    t->d.base_url = "http://127.0.0.1/v1";
    t->d.streaming = true;
    t->d.max_retries = -1;
    t->d.callbacks = t->callbacks;
    t->d.n_callbacks = 1;
}

/* On recordings in memory and the virtual clock. */
static void talk_replay(talk *t, const llmcb_recording *rec, size_t n)
{
    llmcb_replay_desc rd;

    talk_init(t, true);
    memset(&rd, 0, sizeof rd);
    rd.recordings = rec;
    rd.n_recordings = n;
    t->tr = llmcb_replay_new(t->loop, &rd);
    if (!t->tr) abort();
    t->d.transport = t->tr;
}

/* On plain sockets. */
static void talk_sock(talk *t, const server_script *scripts, size_t n)
{
    talk_init(t, false);
    t->server = server_start(scripts, n);
    t->tr = llmcb_socket_transport(t->loop);
    if (!t->server || !t->tr) abort();
    t->d.base_url = server_base(t->server);
    t->d.transport = t->tr;
}

static llmcb_code talk_ask(talk *t)
{
    int64_t sleep = t->s.sleep;

    if (!t->chat) t->chat = llmcb_chat_new(t->loop, &t->d);
    llmcb_op_free(t->op);
    memset(&t->s, 0, sizeof t->s);
    t->s.sleep = sleep;
    t->op = llmcb_chat_generate(t->chat, &question, 1, NULL);
    return llmcb_op_wait(t->op);
}

static void talk_end(talk *t)
{
    llmcb_op_free(t->op);
    llmcb_chat_free(t->chat);
    CHECK_INT(llmcb_loop_free(t->loop), LLMCB_OK);
    server_stop(t->server);
}

static llmcb_recording recording(const char *bytes, llmcb_replay_end end)
{
    llmcb_recording r;

    memset(&r, 0, sizeof r);
    r.bytes = bytes;
    r.len = strlen(bytes);
    r.end = end;
    return r;
}

static server_script script(const char *bytes, server_end end)
{
    server_script s;

    memset(&s, 0, sizeof s);
    s.bytes = bytes;
    s.end = end;
    return s;
}

/* ---- time ---------------------------------------------------------------- */

/* A transport that never gets anywhere: connect_ms must be the library's. */
typedef struct mute {
    llmcb_transport base;
    llmcb_exchange *x; /* the last one */
    size_t n_started, n_cancelled, n_freed;
} mute;

static llmcb_code mute_start(llmcb_transport *tr, llmcb_exchange *x,
                             const llmcb_request *request)
{
    (void)request;
    ((mute *)(void *)tr)->x = x;
    ((mute *)(void *)tr)->n_started++;
    return LLMCB_OK;
}

static void mute_nothing(llmcb_transport *tr, llmcb_exchange *x)
{
    (void)tr;
    (void)x;
}

static void mute_cancel(llmcb_transport *tr, llmcb_exchange *x)
{
    (void)x;
    ((mute *)(void *)tr)->n_cancelled++;
}

static void mute_free(llmcb_transport *tr)
{
    ((mute *)(void *)tr)->n_freed++;
}

static void mute_init(mute *m, llmcb_loop *loop)
{
    memset(m, 0, sizeof *m);
    m->base.start = mute_start;
    m->base.resume = m->base.release = mute_nothing;
    m->base.cancel = mute_cancel;
    m->base.free = mute_free;
    CHECK_INT(llmcb_transport_init(loop, &m->base), LLMCB_OK);
}

TEST(time_connect)
{
    talk t;
    mute m;
    int retries;

    for (retries = 0; retries < 3; retries++) {
        talk_init(&t, true);
        mute_init(&m, t.loop);
        t.d.transport = &m.base;
        t.d.connect_ms = 3000;
        t.d.max_retries = retries ? retries : -1;
        CHECK_INT(talk_ask(&t), LLMCB_ETIMEDOUT);
        CHECK_INT(t.s.error.detail, LLMCB_DETAIL_CONNECT);
        CHECK_INT(t.s.error.attempt, retries + 1);
        CHECK_INT(t.s.n_retry, retries); /* it is retried */
        CHECK_INT(m.n_started, retries + 1);
        CHECK_INT(m.n_cancelled, retries + 1);
        CHECK_INT(llmcb_loop_now(t.loop),
                  3000 * (retries + 1) + t.s.delay[0] + t.s.delay[1]);
        talk_end(&t);
        CHECK_INT(m.n_freed, 1);
    }
}

TEST(time_defaults)
{
    talk t;
    mute m;
    llmcb_recording silence = recording("", LLMCB_REPLAY_KEEP);
    llmcb_recording stall = recording(SSE "\r\n" EV("a"), LLMCB_REPLAY_KEEP);

    talk_init(&t, true);
    mute_init(&m, t.loop);
    t.d.transport = &m.base;
    CHECK_INT(talk_ask(&t), LLMCB_ETIMEDOUT);
    CHECK_INT(llmcb_loop_now(t.loop), 10000);
    talk_end(&t);

    talk_replay(&t, &silence, 1);
    CHECK_INT(talk_ask(&t), LLMCB_ETIMEDOUT);
    CHECK_INT(t.s.error.detail, LLMCB_DETAIL_FIRST_BYTE);
    CHECK_INT(llmcb_loop_now(t.loop), 600000);
    talk_end(&t);

    talk_replay(&t, &stall, 1);
    CHECK_INT(talk_ask(&t), LLMCB_ETIMEDOUT);
    CHECK_INT(t.s.error.detail, LLMCB_DETAIL_IDLE);
    CHECK_INT(llmcb_loop_now(t.loop), 120000);
    talk_end(&t);
}

TEST(time_first_byte)
{
    llmcb_recording rec[2];
    talk t;

    rec[0] = recording("", LLMCB_REPLAY_KEEP);
    rec[1] = recording(HELLO, LLMCB_REPLAY_CLOSE);
    talk_replay(&t, rec, 2);
    t.d.first_byte_ms = 5000;
    CHECK_INT(talk_ask(&t), LLMCB_ETIMEDOUT);
    CHECK_INT(t.s.error.detail, LLMCB_DETAIL_FIRST_BYTE);
    CHECK_INT(llmcb_loop_now(t.loop), 5000);
    talk_end(&t);

    talk_replay(&t, rec, 2); /* and it is retried */
    t.d.first_byte_ms = 5000;
    t.d.max_retries = 1;
    CHECK_INT(talk_ask(&t), LLMCB_OK);
    CHECK_INT(t.s.n_retry, 1);
    CHECK_INT(t.s.retried.code, LLMCB_ETIMEDOUT);
    CHECK_INT(llmcb_loop_now(t.loop), 5000 + t.s.delay[0]);
    CHECK_STR(t.s.tokens, "Hel|lo||");
    talk_end(&t);

    /* the head alone is no byte of an answer */
    rec[0] = recording(SSE "\r\n", LLMCB_REPLAY_KEEP);
    talk_replay(&t, rec, 2);
    t.d.first_byte_ms = 5000;
    t.d.idle_ms = 1000;
    CHECK_INT(talk_ask(&t), LLMCB_ETIMEDOUT);
    CHECK_INT(t.s.error.detail, LLMCB_DETAIL_FIRST_BYTE);
    CHECK_INT(t.s.error.http_status, 200);
    talk_end(&t);
}

/* Events that are like the one before but for text and padding are read in
 * another way when they come whole than when they come in two halves. What
 * is told must be the same. */
#define PAD(t, pad)                                                    \
    "data: {\"id\":\"i\",\"choices\":[{\"index\":0,\"delta\":{"        \
    "\"content\":\"" t "\"},\"finish_reason\":null}],\"usage\":null,"  \
    "\"obfuscation\":\"" pad "\"}\n\n"

/* The same stream with other line ends, or without the space that may follow
 * "data:". */
static const char *reframed(const char *body, const char *space,
                            const char *line_end)
{
    static char out[8192];
    char *at = out;

    for (; *body; body++) {
        if (strncmp(body, "data: ", 6) == 0) {
            at += sprintf(at, "data:%s", space);
            body += 5;
        } else if (*body == '\n') {
            at += sprintf(at, "%s", line_end);
        } else {
            *at++ = *body;
        }
    }
    *at = '\0';
    return out;
}

TEST(padding)
{
    static const struct {
        const char *body, *tokens;
        llmcb_code code;
    } cases[] = {
        { PAD("a", "") PAD("b", "xyz") PAD("", "q") PAD("c", "xy") DONE,
          "a|b||c|", LLMCB_OK },
        { PAD("a", "1") PAD("\\u00e9\\n", "2\\\"}") PAD("b", "\\\\") PAD("c", "")
              DONE, "a|\xC3\xA9\n|b|c|", LLMCB_OK },
        { PAD("a", "1") EV("b") PAD("c", "") EV("d") EV("e") PAD("f", "2") DONE,
          "a|b|c|d|e|f|", LLMCB_OK },
        { PAD("a", "1") PAD("\\\"obfuscation\\\":\\\"x", "2")
              PAD("\"}}],\"obfuscation\":\"3", "4") PAD("c", "5") DONE,
          "a|\"obfuscation\":\"x|", LLMCB_EJSON },
        { PAD("a", "1") ": comment\n\n" PAD("b", "22")
              "event: x\n" PAD("c", "3") PAD("d", "44") DONE,
          "a|b|c|d|", LLMCB_OK },
        { PAD("a", "1") PAD("b", "2\t") DONE, "a|", LLMCB_EJSON },
        { PAD("a", "1") PAD("b", "2\\x") DONE, "a|", LLMCB_EJSON },
        { PAD("a", "1") PAD("b", "2\",\"usage\":{\"prompt_tokens\":1},\"p\":\"")
              PAD("c", "3") DONE, "a|b|c|", LLMCB_OK },
        { PAD("a", "1") PAD("b", "2\",\"error\":\"bad") DONE, "a|",
          LLMCB_EAPI },
        { PAD("a", "1")
              "data: {\"id\":\"i\",\"choices\":[{\"index\":0,\"delta\":{"
              "\"content\":\"b\"},\"finish_reason\":null}],\"usage\":null,"
              "\"obfuscation\":\"2\"}x\n\n" DONE,
          "a|", LLMCB_EJSON },
        { PAD("a", "1") PAD("b\\x", "2") DONE, "a|", LLMCB_EJSON },
        { PAD("a", "1") PAD("b\001", "2") DONE, "a|", LLMCB_EJSON },
        { PAD("a", "1") PAD("b\\u12g4", "2") DONE, "a|", LLMCB_EJSON },
        { PAD("a", "1") PAD("\\u2713\\u000a\\\"\\/", "2") PAD("\xFF", "3")
              PAD("b\xE2\x82\xAC", "") PAD("a text of more than 16 bytes", "4")
              PAD("and one with \\u20ac of more", "5") DONE,
          "a|\xE2\x9C\x93\n\"/|\xEF\xBF\xBD|b\xE2\x82\xAC|"
          "a text of more than 16 bytes|and one with \xE2\x82\xAC of more|",
          LLMCB_OK },
        { PAD("a\\ud83d", "1") PAD("\\ude00b", "2") DONE,
          "a|\xF0\x9F\x98\x80" "b|", LLMCB_OK },
    };
    static const char *const spaces[] = { " ", "", " ", "" };
    static const char *const ends[] = { "\n", "\n", "\r\n", "\r" };
    llmcb_segment segs[4096];
    char bytes[4096];
    size_t i, f, k, step, n;

    for (i = 0; i < 4 * sizeof cases / sizeof *cases; i++)
        for (step = 1; step <= 4096; step = step == 60 ? 4096 : step + 1) {
            llmcb_recording rec;
            talk t;
            f = i % 4;
            snprintf(bytes, sizeof bytes, "%s\r\n%s", SSE,
                     reframed(cases[i / 4].body, spaces[f], ends[f]));
            rec = recording(bytes, LLMCB_REPLAY_CLOSE);
            n = 0;
            for (k = 0; k < strlen(bytes); k += step) {
                segs[n].offset = k;
                segs[n++].delay_ms = 0;
            }
            rec.segments = segs;
            rec.n_segments = n;
            talk_replay(&t, &rec, 1);
            CHECK_INT(talk_ask(&t), cases[i / 4].code);
            CHECK_STR(t.s.tokens, cases[i / 4].tokens);
            talk_end(&t);
        }
}

/* limits.text where each event is like the one before, with short and long
 * texts and escapes, for handlers inline and on the pool: what fits is told. */
TEST(limit_of_text_of_events_that_are_alike)
{
    static const char *const told[] = { "abc", "d", "", "\xC3\xA9" "f", "ghi",
                                        "a text of more than 16 bytes\n", "jk",
                                        "lm" };
    static const char body[] = SSE "\r\n" PAD("abc", "1") PAD("d", "")
        PAD("", "") PAD("\\u00e9f", "22") PAD("ghi", "")
        PAD("a text of more than 16 bytes\\n", "3") PAD("jk", "") PAD("lm", "")
        DONE;
    llmcb_recording rec = recording(body, LLMCB_REPLAY_CLOSE);
    size_t limit, i;
    int on_pool;

    for (on_pool = 0; on_pool < 2; on_pool++)
        for (limit = 1; limit <= 43; limit++) {
            char want[128] = "";
            size_t total = 0;
            talk t;
            for (i = 0; i < sizeof told / sizeof *told; i++) {
                total += strlen(told[i]);
                if (total > limit) break;
                strcat(strcat(want, told[i]), "|");
            }
            talk_replay(&t, &rec, 1);
            t.d.limits.text = limit;
            if (on_pool) t.h.flags = 0;
            CHECK_INT(talk_ask(&t), total > limit ? LLMCB_ELIMIT : LLMCB_OK);
            CHECK_STR(t.s.tokens, want);
            talk_end(&t);
        }
}

/* An event that begins like the one before and ends in another way, as the
 * last often does: what was read of it must not show behind the text. */
TEST(text_ends_where_an_event_is_like_another_in_part)
{
    static const char *const last[] = {
        "\"},\"finish_reason\":\"stop\"}],\"usage\":null}\n\n",
        "\"},\"finish_reason\":null}],\"usage\":{\"prompt_tokens\":1,"
        "\"completion_tokens\":2}}\n\n",
        "\\ud83d", /* and no more comes */
        "never told",
    };
    size_t i;
    int on_pool;

    for (i = 0; i < sizeof last / sizeof *last; i++)
        for (on_pool = 0; on_pool < 2; on_pool++) {
            char bytes[2048];
            const llmcb_result *r;
            llmcb_recording rec;
            talk t;
            snprintf(bytes, sizeof bytes, "%s\r\n%s%s%s%s", SSE,
                     PAD("abc", "") PAD("d", ""),
                     "data: {\"id\":\"i\",\"choices\":[{\"index\":0,\"delta\":{"
                     "\"content\":\"", last[i], i < 2 ? DONE : "");
            rec = recording(bytes, LLMCB_REPLAY_CLOSE);
            talk_replay(&t, &rec, 1);
            if (on_pool) t.h.flags = 0;
            CHECK_INT(talk_ask(&t), i < 2 ? LLMCB_OK : LLMCB_ETRUNCATED);
            r = llmcb_op_result(t.op);
            CHECK_INT(r->generations[0].text.len, 4);
            CHECK_STR(r->generations[0].text.ptr, "abcd");
            talk_end(&t);
        }
}

/* limits.event where events are like the one before: the longest that is
 * allowed is told, one byte more is not, in one piece and in two. */
TEST(limit_of_events_that_are_alike)
{
    static const char body[] = SSE "\r\n" EV("a") EV("b") EV("c and more") DONE;
    const size_t longest = sizeof EV("c and more") - sizeof "\n\n";
    size_t less, cut;

    for (less = 0; less < 2; less++)
        for (cut = 0; cut < 2; cut++) {
            llmcb_recording rec = recording(body, LLMCB_REPLAY_CLOSE);
            llmcb_segment segs[2] = { { 0, 0 }, { 0, 0 } };
            talk t;
            segs[1].offset = sizeof body - sizeof DONE - 20;
            rec.segments = segs;
            rec.n_segments = 1 + cut;
            talk_replay(&t, &rec, 1);
            t.d.limits.event = longest - less;
            CHECK_INT(talk_ask(&t), less ? LLMCB_ELIMIT : LLMCB_OK);
            CHECK_STR(t.s.tokens, less ? "a|b|" : "a|b|c and more|");
            talk_end(&t);
        }
}

/* Long texts and paddings in two reads, with the border anywhere. */
TEST(a_read_that_ends_anywhere)
{
#define LONG                                                           \
    "a text that has some more bytes than all that stands around it in " \
    "an event, so that it can be long enough and still not be whole: "  \
    "0123456789 0123456789 0123456789 0123456789 0123456789 0123456789"
    static const char body[] = SSE "\r\n" PAD("a", "") PAD(LONG, "1")
        PAD("b", LONG) PAD(LONG "\\n", "") PAD("c", "") DONE;
    llmcb_recording rec = recording(body, LLMCB_REPLAY_CLOSE);
    llmcb_segment segs[2] = { { 0, 0 }, { 0, 0 } };

    rec.segments = segs;
    rec.n_segments = 2;
    for (; segs[1].offset < sizeof body; segs[1].offset++) {
        talk t;
        talk_replay(&t, &rec, 1);
        CHECK_INT(talk_ask(&t), LLMCB_OK);
        CHECK_STR(t.s.tokens, "a|" LONG "|b|" LONG "\n|c|");
        talk_end(&t);
    }
}

/* Borders that go back, begin late or lie behind the end: each byte comes
 * once. */
TEST(borders_in_no_order)
{
    static const size_t offsets[][3] = { { 0, 80, 10 },
                                         { 90, 5, 80 },
                                         { 0, 100000, 3 } };
    static const char body[] = SSE "\r\n" EV("a") EV("b") DONE;
    size_t i, k;

    for (i = 0; i < sizeof offsets / sizeof *offsets; i++) {
        llmcb_recording rec = recording(body, LLMCB_REPLAY_CLOSE);
        llmcb_segment segs[3];
        talk t;
        for (k = 0; k < 3; k++) {
            segs[k].offset = offsets[i][k];
            segs[k].delay_ms = 0;
        }
        rec.segments = segs;
        rec.n_segments = 3;
        talk_replay(&t, &rec, 1);
        CHECK_INT(talk_ask(&t), LLMCB_OK);
        CHECK_STR(t.s.tokens, "a|b|");
        talk_end(&t);
    }
}

/* One event that fills the log three times; then its last choice is too much
 * for the answer. */
TEST(an_event_larger_than_the_window)
{
    static const char body[] = SSE "Connection: close\r\n\r\n"
        "data: {\"choices\":["
        "{\"index\":0,\"delta\":{\"content\":\"ab\"}},"
        "{\"index\":1,\"delta\":{\"content\":\"cd\"}},"
        "{\"index\":2,\"delta\":{\"content\":\"ef\"}}]}\n\n" DONE;
    llmcb_recording rec = recording(body, LLMCB_REPLAY_CLOSE);
    size_t limit;
    talk t;

    for (limit = 5; limit <= 6; limit++) {
        talk_replay(&t, &rec, 1);
        t.d.limits.window_events = 1;
        t.d.limits.text = limit;
        CHECK_INT(talk_ask(&t), limit == 6 ? LLMCB_OK : LLMCB_ELIMIT);
        CHECK_STR(t.s.tokens, limit == 6 ? "ab|cd|ef|" : "ab|cd|");
        talk_end(&t);
    }
}

/* The streams of a chat share what their events look like, but for the bytes
 * up to where they last differ: those are each stream's own, and count too. */
#define OWN(id, index, x, t)                                          \
    "data: {\"id\":\"" id "\",\"choices\":[{\"index\":" index ",\"x\":" \
    x ",\"delta\":{\"content\":\"" t "\"}}]}\n\n"

TEST(streams_that_look_alike)
{
    static const char *const bodies[] = {
        OWN("1", "0", "1", "a") OWN("1", "0", "1", "b") DONE,
        OWN("2", "0", "2", "a") OWN("2", "0", "2", "b") OWN("2", "1", "2", "c")
            OWN("2", "0", "2", "d") OWN("2", "0", "3", "e") DONE,
        OWN("1", "0", "1", "a") OWN("1", "1", "1", "c") OWN("1", "0", "1", "b")
            DONE,
        OWN("1", "0", "1", "a\"},\"longer\":{\"than\":\"before")
            OWN("1", "0", "1", "b\"},\"longer\":{\"than\":\"before") DONE,
        /* more looks than a chat remembers */
        OWN("", "0", "1", "a") OWN("", "0", "1", "b") DONE,
        OWN("33", "0", "1", "a") OWN("33", "0", "1", "b") DONE,
        OWN("444", "0", "1", "a") OWN("444", "0", "1", "b") DONE,
        OWN("5555", "0", "1", "a") OWN("4555", "0", "1", "b")
            OWN("4555", "0", "1", "c") DONE,
        OWN("66666", "0", "1", "a") OWN("66666", "0", "1", "b") DONE,
        OWN("1", "0", "1", "a") OWN("1", "0", "1", "b") DONE,
    };
    enum { N = sizeof bodies / sizeof *bodies };
    llmcb_recording rec[N];
    char bytes[N][1024];
    const llmcb_result *r;
    size_t i;
    talk t;

    for (i = 0; i < N; i++) {
        snprintf(bytes[i], sizeof bytes[i], "%s\r\n%s", SSE, bodies[i]);
        rec[i] = recording(bytes[i], LLMCB_REPLAY_CLOSE);
    }
    talk_replay(&t, rec, N);
    for (i = 0; i < N; i++) {
        CHECK_INT(talk_ask(&t), LLMCB_OK);
        CHECK_STR(t.s.tokens,
                  i == 1   ? "a|b|c|d|e|"
                  : i == 2 ? "a|c|b|"
                  : i == 7 ? "a|b|c|"
                           : "a|b|");
        r = llmcb_op_result(t.op);
        CHECK_INT(r->n_generations, i == 1 || i == 2 ? 2 : 1);
        CHECK_STR(r->generations[0].text.ptr,
                  i == 1 ? "abde" : i == 7 ? "abc" : "ab");
        if (i == 1 || i == 2) CHECK_STR(r->generations[1].text.ptr, "c");
    }
    talk_end(&t);
}

static size_t resized;

static void *count_resize(void *user, void *ptr, size_t old, size_t size)
{
    (void)user;
    (void)old;
    resized++;
    if (size) return realloc(ptr, size);
    free(ptr);
    return NULL;
}

/* What the second stream of a chat allocates, whose n events are by turns of
 * two looks: each is remembered in vain. */
static size_t stream_by_turns(size_t n)
{
    static char bytes[2][64 * 1024];
    llmcb_recording rec[2];
    llmcb_loop_desc ld;
    llmcb_replay_desc rd;
    size_t i, k, before = 0;
    talk t;

    for (k = 0; k < 2; k++) {
        char *at = bytes[k] + sprintf(bytes[k], "%s\r\n", SSE);
        for (i = 0; i < n; i++)
            at += sprintf(at, "data: {\"id\":\"%d\",\"choices\":[{\"index\":0,"
                          "\"delta\":{\"%s\":\"a\"}}]}\n\n", (int)k,
                          i % 2 ? "content" : "reasoning");
        strcpy(at, DONE);
        rec[k] = recording(bytes[k], LLMCB_REPLAY_CLOSE);
    }
    talk_init(&t, true);
    llmcb_loop_free(t.loop);
    memset(&ld, 0, sizeof ld);
    ld.allocator.resize = count_resize;
    t.loop = llmcb_loop_new(&ld);
    memset(&rd, 0, sizeof rd);
    rd.recordings = rec;
    rd.n_recordings = 2;
    t.d.transport = llmcb_replay_new(t.loop, &rd);
    for (k = 0; k < 2; k++) {
        before = resized;
        CHECK_INT(talk_ask(&t), LLMCB_OK);
        CHECK_INT(t.s.n_tokens, n);
    }
    before = resized - before;
    talk_end(&t);
    return before;
}

TEST(streams_that_never_look_alike_allocate_no_more)
{
    size_t some = stream_by_turns(200);

    CHECK(stream_by_turns(600) - some < 400); /* one for each */
}

/* Events with data count, comments and empty events do not. */
TEST(time_idle)
{
    static const char *const pieces[] = { EV("a"), ": c\n\n", EV("b"),
                                          ": c\n\n", "data:\n\n", "id: 1\n\n",
                                          ": c\n\n" };
    llmcb_segment segs[8];
    char bytes[2048] = SSE "\r\n";
    llmcb_recording rec;
    size_t i;
    talk t;

    segs[0].offset = 0;
    segs[0].delay_ms = 0;
    for (i = 0; i < 7; i++) {
        segs[i + 1].offset = strlen(bytes);
        segs[i + 1].delay_ms = 400;
        strcat(bytes, pieces[i]);
    }
    rec = recording(bytes, LLMCB_REPLAY_KEEP);
    rec.segments = segs;
    rec.n_segments = 8;
    talk_replay(&t, &rec, 1);
    t.d.idle_ms = 1000;
    CHECK_INT(talk_ask(&t), LLMCB_ETIMEDOUT);
    CHECK_INT(t.s.error.detail, LLMCB_DETAIL_IDLE);
    CHECK_STR(t.s.tokens, "a|b|");
    CHECK_INT(llmcb_loop_now(t.loop), 1200 + 1000); /* b came at 1200 */
    talk_end(&t);
}

/* A cut event is no event with data, an error in one is. */
TEST(time_idle_in_event)
{
    static const char half[] =
        SSE "\r\n" EV("a") "data: {\"choices\":[{\"delta\":";
    llmcb_segment segs[32];
    llmcb_recording rec = recording(half, LLMCB_REPLAY_KEEP);
    size_t i, base = strlen(SSE "\r\n" EV("a"));
    talk t;

    for (i = 0; i < 32; i++) {
        segs[i].offset = i ? base + i - 1 : 0;
        segs[i].delay_ms = i ? 900 : 0;
    }
    rec.segments = segs;
    rec.n_segments = 30;
    talk_replay(&t, &rec, 1);
    t.d.idle_ms = 1000;
    CHECK_INT(talk_ask(&t), LLMCB_ETIMEDOUT);
    CHECK_INT(t.s.error.detail, LLMCB_DETAIL_IDLE);
    CHECK_STR(t.s.tokens, "a|");
    CHECK_INT(llmcb_loop_now(t.loop), 1000);
    talk_end(&t);
}

TEST(time_total)
{
    llmcb_segment segs[21];
    char bytes[4096] = SSE "\r\n";
    llmcb_recording rec[2];
    size_t i;
    talk t;

    segs[0].offset = 0;
    segs[0].delay_ms = 0;
    for (i = 1; i < 21; i++) {
        segs[i].offset = strlen(bytes);
        segs[i].delay_ms = 500;
        strcat(bytes, EV("x"));
    }
    rec[0] = recording(bytes, LLMCB_REPLAY_KEEP);
    rec[0].segments = segs;
    rec[0].n_segments = 21;
    talk_replay(&t, rec, 1);
    t.d.idle_ms = 1000;
    t.d.total_ms = 3200;
    t.d.max_retries = 5;
    CHECK_INT(talk_ask(&t), LLMCB_ETIMEDOUT);
    CHECK_INT(t.s.error.detail, LLMCB_DETAIL_TOTAL);
    CHECK_INT(t.s.n_tokens, 6);
    CHECK_INT(t.s.n_retry, 0);
    CHECK_INT(llmcb_loop_now(t.loop), 3200);
    talk_end(&t);

    /* it spans all tries and the waits between them */
    rec[0] = recording(FAIL("500", "Retry-After: 2\r\n"), LLMCB_REPLAY_KEEP);
    talk_replay(&t, rec, 1);
    t.d.max_retries = 5;
    t.d.total_ms = 5000;
    CHECK_INT(talk_ask(&t), LLMCB_ETIMEDOUT);
    CHECK_INT(t.s.error.detail, LLMCB_DETAIL_TOTAL);
    CHECK_INT(t.s.n_retry, 3);
    CHECK_INT(llmcb_loop_now(t.loop), 5000);
    talk_end(&t);
}

TEST(time_for_ever)
{
    llmcb_segment segs[2];
    llmcb_recording rec = recording(HELLO, LLMCB_REPLAY_CLOSE);
    talk t;
    int i;

    memset(segs, 0, sizeof segs);
    for (i = 0; i < 2; i++) {
        segs[1].offset = i ? strlen(SSE "Connection: close\r\n\r\n") + 5 : 0;
        segs[1].delay_ms = (int64_t)1000 * 3600 * 24 * 365;
        rec.segments = segs;
        rec.n_segments = 2;
        talk_replay(&t, &rec, 1);
        t.d.connect_ms = t.d.first_byte_ms = t.d.idle_ms = t.d.total_ms =
            LLMCB_FOREVER;
        CHECK_INT(talk_ask(&t), LLMCB_OK);
        CHECK_STR(t.s.tokens, "Hel|lo||");
        talk_end(&t);
    }
}

/* While a slow handler holds the transport, the clocks stand still. */
TEST(time_paused)
{
    llmcb_recording rec;
    char bytes[8192] = SSE "Connection: close\r\n\r\n";
    size_t i;
    talk t;

    for (i = 0; i < 20; i++) strcat(bytes, EV("x"));
    strcat(bytes, FIN DONE);
    rec = recording(bytes, LLMCB_REPLAY_CLOSE);
    talk_replay(&t, &rec, 1);
    memset(&t.h, 0, sizeof t.h);
    t.h.async.on_chat_model_start = t.h.async.on_llm_new_token =
        t.h.async.on_llm_end = t.h.async.on_llm_error = note_slowly;
    t.h.user = &t.s;
    t.s.sleep = 1000;
    t.d.limits.window_events = 2;
    t.d.idle_ms = 500;
    t.d.total_ms = 1500;
    CHECK_INT(talk_ask(&t), LLMCB_OK);
    CHECK_INT(t.s.n_tokens, 21);
    CHECK_INT(llmcb_loop_now(t.loop), 21000);
    talk_end(&t);
}

/* ... and what was lost then is not counted later, when the server is waited
 * for again. */
TEST(time_paused_then_waited)
{
    static const char head[] =
        SSE "Connection: close\r\n\r\n" EV("a") EV("b") EV("c") EV("d");
    static const char rest[] = EV("e") FIN DONE;
    llmcb_segment segs[4];
    char bytes[1024];
    llmcb_recording rec;
    talk t;
    size_t i;

    /* the first two delays pass while it is paused, the third does not */
    snprintf(bytes, sizeof bytes, "%s: c\n\n: c\n\n%s", head, rest);
    memset(segs, 0, sizeof segs);
    for (i = 1; i < 4; i++) {
        segs[i].offset = strlen(head) + 5 * (i - 1);
        segs[i].delay_ms = 400;
    }
    rec = recording(bytes, LLMCB_REPLAY_CLOSE);
    rec.segments = segs;
    rec.n_segments = 4;
    talk_replay(&t, &rec, 1);
    memset(&t.h, 0, sizeof t.h);
    t.h.async.on_chat_model_start = t.h.async.on_llm_new_token =
        t.h.async.on_llm_end = t.h.async.on_llm_error = note_slowly;
    t.h.user = &t.s;
    t.s.sleep = 1000;
    t.d.limits.window_events = 2;
    t.d.idle_ms = 500;
    t.d.total_ms = 1500;
    CHECK_INT(talk_ask(&t), LLMCB_OK);
    CHECK_STR(t.s.tokens, "a|b|c|d|e||");
    talk_end(&t);
}

/* ... whatever comes meanwhile: the time before it is not counted either. */
TEST(time_at_a_full_window)
{
    static const char head[] = SSE "Connection: close\r\n\r\n" EV("a");
    llmcb_recording rec = recording(SSE "Connection: close\r\n\r\n" EV("a")
                                        EV("b") EV("c") FIN DONE,
                                    LLMCB_REPLAY_CLOSE);
    const llmcb_chunk *chunk;
    llmcb_segment segs[3];
    talk t;

    memset(segs, 0, sizeof segs);
    segs[1].offset = strlen(head);
    segs[1].delay_ms = 350;
    segs[2].offset = strlen(head) + strlen(EV("b"));
    segs[2].delay_ms = 400;
    rec.segments = segs;
    rec.n_segments = 3;
    talk_replay(&t, &rec, 1);
    t.d.n_callbacks = 0;
    t.d.limits.window_events = 1;
    t.d.total_ms = 300;
    t.chat = llmcb_chat_new(t.loop, &t.d);
    t.op = llmcb_chat_stream(t.chat, &question, 1, NULL);
    while (llmcb_loop_now(t.loop) < 350) llmcb_loop_run_once(t.loop, 0);
    CHECK_INT(llmcb_loop_now(t.loop), 350); /* b came, and nobody has read a */
    llmcb_clock_advance(t.loop, 250);
    while (llmcb_op_next(t.op, &chunk)) continue;
    CHECK_INT(llmcb_op_wait(t.op), LLMCB_OK);
    CHECK_STR(llmcb_op_text(t.op).ptr, "abc");
    CHECK_INT(llmcb_loop_now(t.loop), 750);
    talk_end(&t);
}

/* Reads all, as the header says it is done in a coroutine. */
typedef struct pull {
    llmcb_op *op;
    size_t chunks, text;
} pull;

static llmcb_step pull_step(llmcb_task *t)
{
    pull *p = (pull *)t->self;
    const llmcb_chunk *chunk;

    LLMCB_BEGIN(t);
    for (;;) {
        LLMCB_AWAIT(t, llmcb_await_chunk(t, p->op));
        if (t->result != LLMCB_OK) return t->result;
        if (!llmcb_op_next(p->op, &chunk)) break;
        p->chunks++;
        p->text += chunk->text.len;
    }
    LLMCB_END(t);
}

/* The chunk that was read last may fill the window by itself: who waits for
 * the next one has given it back. Turns are counted, since a loop in which
 * each waits for the other has nothing to do for ever. */
TEST(await_chunk_in_a_window_that_the_last_one_fills)
{
    enum { N = 12, TEXT = 60 };
    static const struct {
        size_t events, bytes;
        int64_t gap;
    } rows[] = { { 1, 0, 0 }, { 1, 0, 10 }, { 0, 100, 0 }, { 0, 100, 10 } };
    size_t i, k;

    for (i = 0; i < sizeof rows / sizeof *rows; i++) {
        llmcb_recording rec;
        llmcb_segment segs[N];
        char bytes[8192] = SSE "\r\n";
        char text[TEXT + 1];
        pull p;
        llmcb_op *reads;
        talk t;

        memset(segs, 0, sizeof segs);
        memset(text, 'x', TEXT);
        text[TEXT] = '\0';
        for (k = 0; k < N; k++) {
            if (k) segs[k].offset = strlen(bytes);
            segs[k].delay_ms = rows[i].gap;
            sprintf(bytes + strlen(bytes), EV("%s"), text);
        }
        strcat(bytes, FIN DONE);
        rec = recording(bytes, LLMCB_REPLAY_CLOSE);
        if (rows[i].gap) {
            rec.segments = segs;
            rec.n_segments = N;
        }
        talk_replay(&t, &rec, 1);
        t.d.n_callbacks = 0;
        t.d.limits.window_events = rows[i].events;
        t.d.limits.window_bytes = rows[i].bytes;
        t.chat = llmcb_chat_new(t.loop, &t.d);
        t.op = llmcb_chat_stream(t.chat, &question, 1, NULL);
        memset(&p, 0, sizeof p);
        p.op = t.op;
        reads = llmcb_task_start(t.loop, pull_step, 0, &p);
        for (k = 0; k < 200 && !llmcb_op_done(reads); k++)
            llmcb_loop_run_once(t.loop, 10);
        CHECK(llmcb_op_done(reads));
        CHECK_INT(llmcb_op_code(reads), LLMCB_OK);
        CHECK(llmcb_op_done(t.op));
        CHECK_INT(llmcb_op_code(t.op), LLMCB_OK);
        CHECK(p.chunks >= N);
        CHECK_INT(p.text, N * TEXT);
        llmcb_op_free(reads);
        talk_end(&t);
    }
}

/* A status that is no success stands, though its words do not end, or do not
 * even begin. */
TEST(words_of_an_error_that_stall)
{
    static const struct {
        const char *status, *fields, *body;
        llmcb_code code;
        int attempts;
    } rows[] = {
        { "401 Unauthorized", "", "no", LLMCB_EHTTP, 1 },
        { "503 Service Unavailable", "", "no", LLMCB_EHTTP, 2 },
        { "401 Unauthorized", "", "", LLMCB_EHTTP, 1 },
        { "503 Service Unavailable", "", "", LLMCB_EHTTP, 2 },
        { "302 Found", "Location: http://b/\r\n", "no", LLMCB_EREDIRECT, 1 },
        { "302 Found", "Location: http://b/\r\n", "", LLMCB_EREDIRECT, 1 },
    };
    size_t i;

    for (i = 0; i < sizeof rows / sizeof *rows; i++) {
        llmcb_recording rec;
        char bytes[200];
        talk t;

        snprintf(bytes, sizeof bytes,
                 "HTTP/1.1 %s\r\n%sContent-Length: 99\r\n\r\n%s",
                 rows[i].status, rows[i].fields, rows[i].body);
        rec = recording(bytes, LLMCB_REPLAY_KEEP);
        talk_replay(&t, &rec, 1);
        t.d.first_byte_ms = t.d.idle_ms = 1000;
        t.d.max_retries = 1;
        CHECK_INT(talk_ask(&t), rows[i].code);
        CHECK_INT(t.s.error.http_status, atoi(rows[i].status));
        CHECK_INT(t.s.error.attempt, rows[i].attempts);
        CHECK_INT(t.s.n_retry, rows[i].attempts - 1);
        talk_end(&t);
    }
}

/* ... and are waited for while they come. */
TEST(words_of_an_error_that_come_slowly)
{
    static const char head[] = "HTTP/1.1 401 Unauthorized\r\n"
                               "Content-Length: 33\r\n\r\n";
    static const char body[] = "{\"error\":{\"message\":\"all of it\"}}";
    llmcb_segment segs[4];
    llmcb_recording rec;
    char bytes[200];
    size_t i;
    talk t;

    snprintf(bytes, sizeof bytes, "%s%s", head, body);
    rec = recording(bytes, LLMCB_REPLAY_KEEP);
    memset(segs, 0, sizeof segs);
    for (i = 1; i < 4; i++) {
        segs[i].offset = sizeof head - 1 + 10 * (i - 1);
        segs[i].delay_ms = 700;
    }
    rec.segments = segs;
    rec.n_segments = 4;
    talk_replay(&t, &rec, 1);
    t.d.idle_ms = 1000;
    CHECK_INT(talk_ask(&t), LLMCB_EHTTP);
    CHECK(strstr(t.s.error.message, "all of it"));
    talk_end(&t);
}

/* ... and go on when it is the server that is slow. */
TEST(time_paused_then_stalled)
{
    llmcb_recording rec;
    char bytes[8192] = SSE "\r\n";
    size_t i;
    talk t;

    for (i = 0; i < 5; i++) strcat(bytes, EV("x"));
    rec = recording(bytes, LLMCB_REPLAY_KEEP);
    talk_replay(&t, &rec, 1);
    memset(&t.h, 0, sizeof t.h);
    t.h.async.on_chat_model_start = t.h.async.on_llm_new_token =
        t.h.async.on_llm_end = t.h.async.on_llm_error = note_slowly;
    t.h.user = &t.s;
    t.s.sleep = 1000;
    t.d.limits.window_events = 2;
    t.d.idle_ms = 3500;
    CHECK_INT(talk_ask(&t), LLMCB_ETIMEDOUT);
    CHECK_INT(t.s.error.detail, LLMCB_DETAIL_IDLE);
    CHECK_INT(t.s.n_tokens, 5);
    CHECK(llmcb_loop_now(t.loop) > 5000);
    talk_end(&t);
}

/* None begins to run when a slow handler had held the transport. */
TEST(time_without_limits)
{
    llmcb_recording rec = recording(HELLO, LLMCB_REPLAY_CLOSE);
    llmcb_segment segs[2];
    talk t;

    memset(segs, 0, sizeof segs);
    segs[1].offset = strlen(SSE "Connection: close\r\n\r\n" EV("Hel") EV("lo"));
    segs[1].delay_ms = (int64_t)1000 * 3600 * 24 * 365;
    rec.segments = segs;
    rec.n_segments = 2;
    talk_replay(&t, &rec, 1);
    memset(&t.h, 0, sizeof t.h);
    t.h.async.on_chat_model_start = t.h.async.on_llm_new_token =
        t.h.async.on_llm_end = t.h.async.on_llm_error = note_slowly;
    t.h.user = &t.s;
    t.s.sleep = 1000;
    t.d.limits.window_events = 1;
    t.d.connect_ms = t.d.first_byte_ms = t.d.idle_ms = t.d.total_ms =
        LLMCB_FOREVER;
    CHECK_INT(talk_ask(&t), LLMCB_OK);
    CHECK_STR(t.s.tokens, "Hel|lo||");
    talk_end(&t);
}

/* The largest number is as good as no limit, whatever the clock says. */
TEST(time_of_the_largest_number)
{
    llmcb_recording rec = recording(HELLO, LLMCB_REPLAY_CLOSE);
    server_script s = script(HELLO, SERVER_CLOSE);
    talk t;
    int i;

    for (i = 0; i < 4; i++) { /* with a slow handler, too */
        if (i % 2)
            talk_sock(&t, &s, 1);
        else
            talk_replay(&t, &rec, 1);
        if (i > 1) {
            memset(&t.h, 0, sizeof t.h);
            t.h.async.on_chat_model_start = t.h.async.on_llm_new_token =
                t.h.async.on_llm_end = t.h.async.on_llm_error = note_slowly;
            t.h.user = &t.s;
            t.s.sleep = 5;
            t.d.limits.window_events = 1;
        }
        t.d.connect_ms = t.d.first_byte_ms = t.d.idle_ms = t.d.total_ms =
            t.d.handler_ms = INT64_MAX;
        CHECK_INT(talk_ask(&t), LLMCB_OK);
        CHECK_STR(t.s.tokens, "Hel|lo||");
        talk_end(&t);
    }
}

/* What all handlers are done with no longer counts in the window. */
static size_t most_held;

static int note_held(llmcb_handler *h, const llmcb_event *ev)
{
    const llmcbi_run *run = (const llmcbi_run *)(const void *)ev->run;

    (void)h;
    if (run->held > most_held) most_held = run->held;
    return 0;
}

TEST(what_has_been_told_is_not_held)
{
    static char bytes[30 * 20 * 100 + 200];
    llmcb_segment segs[31];
    llmcb_recording rec;
    size_t n, i;
    talk t;

    memset(segs, 0, sizeof segs);
    n = (size_t)sprintf(bytes, "%s", SSE "Connection: close\r\n\r\n");
    for (i = 0; i < 30 * 20; i++) {
        if (i % 20 == 0) {
            segs[1 + i / 20].offset = n;
            segs[1 + i / 20].delay_ms = 10;
        }
        n += (size_t)sprintf(bytes + n, "%s", EV("twenty bytes of text"));
    }
    sprintf(bytes + n, "%s", FIN DONE);
    rec = recording(bytes, LLMCB_REPLAY_CLOSE);
    rec.segments = segs;
    rec.n_segments = 31;
    talk_replay(&t, &rec, 1);
    t.h.sync.on_llm_new_token = note_held;
    most_held = 0;
    CHECK_INT(talk_ask(&t), LLMCB_OK);
    CHECK(most_held > 0 && most_held < 16384);
    talk_end(&t);
}

/* A transport that ends while a slow handler still holds it: how it ended
 * counts when all that it brought has been told. */
typedef struct pusher {
    mute base;
    llmcb_exchange *x;
    const char *body;
    llmcb_ending ending;
    size_t n_resumed;
} pusher;

static void push_all(void *arg)
{
    pusher *u = (pusher *)arg;

    llmcb_exchange_connected(u->x);
    llmcb_exchange_status(u->x, 200);
    llmcb_exchange_header(u->x, llmcb_text("content-type"),
                          llmcb_text("text/event-stream"));
    CHECK(!llmcb_exchange_data(u->x, u->body, strlen(u->body)));
    llmcb_exchange_end(u->x, u->ending, LLMCB_EPROTO, 0, "a reason");
}

static llmcb_code push_start(llmcb_transport *tr, llmcb_exchange *x,
                             const llmcb_request *request)
{
    pusher *u = (pusher *)(void *)tr;

    (void)request;
    u->x = x;
    return llmcb_loop_post(tr->loop, push_all, u);
}

static void push_resume(llmcb_transport *tr, llmcb_exchange *x)
{
    (void)x;
    ((pusher *)(void *)tr)->n_resumed++;
}

TEST(no_exchange_is_no_crash)
{
    llmcb_exchange_connected(NULL);
    llmcb_exchange_status(NULL, 200);
    llmcb_exchange_header(NULL, llmcb_text("a"), llmcb_text("b"));
    CHECK(!llmcb_exchange_data(NULL, "x", 1));
    llmcb_exchange_end(NULL, LLMCB_ORDERLY, LLMCB_OK, 0, "");
    CHECK(!llmcb_exchange_state(NULL));
}

TEST(an_end_while_paused_is_the_end)
{
    static const struct {
        llmcb_ending ending;
        bool finished;
        llmcb_code code;
    } rows[] = {
        { LLMCB_ORDERLY, false, LLMCB_ETRUNCATED },
        { LLMCB_ORDERLY, true, LLMCB_OK },
        { LLMCB_CUT, false, LLMCB_ETRUNCATED },
        { LLMCB_CUT, true, LLMCB_OK },
        { LLMCB_BROKEN, false, LLMCB_EPROTO },
        { LLMCB_BROKEN, true, LLMCB_EPROTO },
    };
    size_t i;

    for (i = 0; i < sizeof rows / sizeof *rows; i++) {
        pusher u;
        talk t;
        talk_init(&t, true);
        mute_init(&u.base, t.loop);
        u.base.base.start = push_start;
        u.base.base.resume = push_resume;
        u.body = rows[i].finished ? EV("a") EV("b") EV("c") EV("d") FIN
                                  : EV("a") EV("b") EV("c") EV("d");
        u.ending = rows[i].ending;
        u.n_resumed = 0;
        t.d.transport = &u.base.base;
        memset(&t.h, 0, sizeof t.h);
        t.h.async.on_chat_model_start = t.h.async.on_llm_new_token =
            t.h.async.on_llm_end = t.h.async.on_llm_error = note_slowly;
        t.h.user = &t.s;
        t.s.sleep = 1000;
        t.d.limits.window_events = 2;
        CHECK_INT(talk_ask(&t), rows[i].code);
        CHECK_STR(t.s.tokens, rows[i].finished ? "a|b|c|d||" : "a|b|c|d|");
        CHECK((u.ending == LLMCB_BROKEN) ==
              (strstr(t.s.error.message, "a reason") != NULL));
        CHECK_INT(u.n_resumed + u.base.n_cancelled, 0);
        talk_end(&t);
    }
}

/* ---- the environment ----------------------------------------------------- */

static void clear_env(void)
{
    unsetenv("OPENAI_API_KEY");
    unsetenv("OPENAI_BASE_URL");
    unsetenv("OPENAI_ORG_ID");
}

TEST(environment)
{
    server_script s = script(HELLO, SERVER_CLOSE);
    char v[128];
    const server_req *r;
    talk t;

    clear_env();
    talk_sock(&t, &s, 1);
    setenv("OPENAI_API_KEY", "sk-from-env", 1);
    setenv("OPENAI_BASE_URL", server_base(t.server), 1);
    setenv("OPENAI_ORG_ID", "org-from-env", 1);
    t.d.api_key = t.d.base_url = NULL;
    CHECK_INT(talk_ask(&t), LLMCB_OK);
    r = server_request(t.server, 0);
    CHECK_STR(server_header(r, "Authorization", v, sizeof v),
              "Bearer sk-from-env");
    CHECK_STR(server_header(r, "OpenAI-Organization", v, sizeof v),
              "org-from-env");
    /* read when the chat is made */
    setenv("OPENAI_API_KEY", "sk-changed", 1);
    CHECK_INT(talk_ask(&t), LLMCB_OK);
    CHECK_STR(server_header(server_request(t.server, 1), "Authorization", v,
                            sizeof v),
              "Bearer sk-from-env");
    talk_end(&t);

    /* what the descriptor says wins; "" is a word, too */
    talk_sock(&t, &s, 1);
    t.d.api_key = "";
    t.d.organization = "";
    setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1", 1);
    CHECK_INT(talk_ask(&t), LLMCB_OK);
    r = server_request(t.server, 0);
    CHECK(!server_header(r, "Authorization", v, sizeof v));
    CHECK(!server_header(r, "OpenAI-Organization", v, sizeof v));
    talk_end(&t);

    /* a variable that is empty is none */
    talk_sock(&t, &s, 1);
    setenv("OPENAI_BASE_URL", "", 1);
    t.d.api_key = t.d.base_url = NULL;
    t.chat = llmcb_chat_new(t.loop, &t.d);
    CHECK_INT(llmcb_chat_error(t.chat)->code, LLMCB_OK);
    talk_end(&t);

    /* what is refused in a descriptor is refused here */
    talk_sock(&t, &s, 1);
    setenv("OPENAI_API_KEY", "sk-secret\n", 1);
    t.d.api_key = NULL;
    CHECK_INT(talk_ask(&t), LLMCB_EINVAL);
    CHECK(strstr(llmcb_chat_error(t.chat)->message, "api_key"));
    CHECK_INT(server_connections(t.server), 0);
    talk_end(&t);
    clear_env();
}

TEST(no_key_for_openai)
{
    llmcb_loop *loop = llmcb_loop_new(NULL);
    llmcb_chat *chat;

    clear_env();
    chat = llmcb_chat_new(loop, NULL);
    REQUIRE(chat);
    CHECK_INT(llmcb_chat_error(chat)->code, LLMCB_EINVAL);
    CHECK(strstr(llmcb_chat_error(chat)->message, "OPENAI_API_KEY"));
    llmcb_chat_free(chat);
    llmcb_loop_free(loop);
}

/* ---- the wire ------------------------------------------------------------ */

TEST(wire_request)
{
    static const llmcb_tool_call call = { { "call_1", 6 }, { "f", 1 },
                                          { "{\"a\": \"\\u00e9\"}", 15 },
                                          true };
    static const llmcb_message talk_messages[] = {
        { .role = LLMCB_SYSTEM, .content = "Be \"brief\"\n" },
        { .role = LLMCB_USER, .content = "caf\xC3\xA9\x01", .name = "ann" },
        { .role = LLMCB_ASSISTANT, .tool_calls = &call, .n_tool_calls = 1 },
        { .role = LLMCB_TOOL, .content = "42", .tool_call_id = "call_1" },
        { .role = LLMCB_USER, .content = "shown", .parts = "[1, 2]" },
        { .role = LLMCB_DEVELOPER, .content = "abcdef", .content_len = 3 },
    };
    static const char want[] =
        "{\"messages\":["
        "{\"role\":\"system\",\"content\":\"Be \\\"brief\\\"\\n\"},"
        "{\"role\":\"user\",\"content\":\"caf\xC3\xA9\\u0001\","
        "\"name\":\"ann\"},"
        "{\"role\":\"assistant\",\"content\":null,\"tool_calls\":[{\"type\":"
        "\"function\",\"id\":\"call_1\",\"function\":{\"name\":\"f\","
        "\"arguments\":\"{\\\"a\\\": \\\"\\\\u00e9\\\"}\"}}]},"
        "{\"role\":\"tool\",\"content\":\"42\",\"tool_call_id\":\"call_1\"},"
        "{\"role\":\"user\",\"content\":[1, 2]},"
        "{\"role\":\"developer\",\"content\":\"abc\"}],"
        "\"model\":\"m\",\"stream\":true,\"stream_options\":{"
        "\"include_usage\":true},\"max_tokens\":7,\"n\":2,\"tools\":[{}],"
        "\"temperature\":0.5,\"stop\":[\"x\"]}";
    static const llmcb_pair headers[] = { { "X-Mine", "a b" } };
    server_script s = script(HELLO, SERVER_CLOSE);
    const server_req *r;
    char v[128], host[64];
    talk t;

    talk_sock(&t, &s, 1);
    t.d.organization = "org-1";
    t.d.max_tokens = 7;
    t.d.n = 2;
    t.d.tools = "[{}]";
    t.d.extra = "{\"temperature\":0.5,\"stop\":[\"x\"]}";
    t.d.headers = headers;
    t.d.n_headers = 1;
    t.chat = llmcb_chat_new(t.loop, &t.d);
    t.op = llmcb_chat_generate(t.chat, talk_messages, 6, NULL);
    CHECK_INT(llmcb_op_wait(t.op), LLMCB_OK);
    REQUIRE(server_requests(t.server) == 1);
    r = server_request(t.server, 0);
    CHECK(strncmp(r->head, "POST /v1/chat/completions HTTP/1.1\r\n", 36) ==
          0);
    snprintf(host, sizeof host, "127.0.0.1:%d", server_port(t.server));
    CHECK_STR(server_header(r, "Host", v, sizeof v), host);
    CHECK_STR(server_header(r, "Content-Type", v, sizeof v),
              "application/json");
    CHECK(server_header(r, "Accept", v, sizeof v) &&
          strstr(v, "text/event-stream"));
    CHECK_STR(server_header(r, "Authorization", v, sizeof v), "Bearer " KEY);
    CHECK_STR(server_header(r, "OpenAI-Organization", v, sizeof v), "org-1");
    CHECK_STR(server_header(r, "X-Mine", v, sizeof v), "a b");
    CHECK_STR(server_header(r, "Idempotency-Key", v, sizeof v),
              llmcb_op_run_at(t.op, 0)->id);
    CHECK(server_header(r, "User-Agent", v, sizeof v) &&
          strncmp(v, "llmcb/", 6) == 0);
    CHECK(!server_header(r, "Expect", v, sizeof v));
    CHECK(!server_header(r, "Accept-Encoding", v, sizeof v));
    CHECK(!server_header(r, "Transfer-Encoding", v, sizeof v));
    CHECK_STR(r->body, want);
    talk_end(&t);
}

#ifndef LLMCB_NO_CURL
/* libcurl sends the same, in another order. */
TEST(wire_request_curl)
{
    server_script s = script(HELLO, SERVER_CLOSE);
    const server_req *a, *b;
    char v[128], w[128];
    static const char *const names[] = { "Content-Type", "Accept",
                                         "Authorization", "User-Agent",
                                         "Content-Length", "Expect",
                                         "Accept-Encoding", "Cookie",
                                         "Host" };
    size_t i;
    talk t;

    talk_sock(&t, &s, 1);
    CHECK_INT(talk_ask(&t), LLMCB_OK);
    llmcb_chat_free(t.chat);
    t.chat = NULL;
    t.d.transport = llmcb_curl_transport(t.loop);
    CHECK_INT(talk_ask(&t), LLMCB_OK);
    REQUIRE(server_requests(t.server) == 2);
    a = server_request(t.server, 0);
    b = server_request(t.server, 1);
    CHECK(strncmp(a->head, b->head, strcspn(a->head, "\n")) == 0);
    CHECK_STR(b->body, a->body);
    for (i = 0; i < sizeof names / sizeof *names; i++) {
        const char *x = server_header(a, names[i], v, sizeof v);
        const char *y = server_header(b, names[i], w, sizeof w);
        CHECK_INT(x != NULL, y != NULL);
        if (x && y) CHECK_STR(y, x);
    }
    talk_end(&t);
}
#endif

/* A header of the program's may have an empty value. */
TEST(wire_empty_header)
{
    static const llmcb_pair headers[] = { { "X-Empty", "" },
                                          { "X-Mine", "a" } };
    int curl;

    for (curl = 0; curl < 2; curl++) {
        server_script s = script(HELLO, SERVER_CLOSE);
        const server_req *r;
        char v[128];
        talk t;

#ifdef LLMCB_NO_CURL
        if (curl) break;
#endif
        talk_sock(&t, &s, 1);
        if (curl) t.d.transport = llmcb_curl_transport(t.loop);
        t.d.headers = headers;
        t.d.n_headers = 2;
        CHECK_INT(talk_ask(&t), LLMCB_OK);
        REQUIRE(server_requests(t.server) == 1);
        r = server_request(t.server, 0);
        CHECK_STR(server_header(r, "X-Empty", v, sizeof v), "");
        CHECK_STR(server_header(r, "X-Mine", v, sizeof v), "a");
        if (test_failures_here) TEST_FAIL("curl %d", curl);
        talk_end(&t);
    }
}

/* Where the request goes, and how it is named there. */
TEST(wire_urls)
{
    static const struct {
        const char *tail, *target;
    } cases[] = {
        { "", "/chat/completions" },
        { "/", "/chat/completions" },
        { "/v1", "/v1/chat/completions" },
        { "/v1/", "/v1/chat/completions" },
        { "/openai/deployments/d?api-version=2024-06-01",
          "/openai/deployments/d/chat/completions?api-version=2024-06-01" },
        { "/a%20b", "/a%20b/chat/completions" },
    };
    size_t i;

    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        server_script s = script(HELLO, SERVER_CLOSE);
        char base[200], line[200];
        talk t;

        talk_sock(&t, &s, 1);
        snprintf(base, sizeof base, "http://127.0.0.1:%d%s",
                 server_port(t.server), cases[i].tail);
        t.d.base_url = base;
        CHECK_INT(talk_ask(&t), LLMCB_OK);
        REQUIRE(server_requests(t.server) == 1);
        snprintf(line, sizeof line, "POST %s HTTP/1.1\r\n", cases[i].target);
        CHECK(strncmp(server_request(t.server, 0)->head, line,
                      strlen(line)) == 0);
        talk_end(&t);
    }
}

/* The members of the request, as the start event shows them. */
TEST(wire_params)
{
    static const struct {
        const char *base;
        bool streaming, no_usage;
        int max_tokens, n;
        const char *extra, *want;
    } cases[] = {
        { "https://api.openai.com/v1", true, false, 5, 0, NULL,
          "{\"model\":\"m\",\"stream\":true,\"stream_options\":{"
          "\"include_usage\":true},\"max_completion_tokens\":5}" },
        { "https://API.OpenAI.com/v1", false, false, 5, 0, NULL,
          "{\"model\":\"m\",\"stream\":false,\"max_completion_tokens\":5}" },
        { "https://x.openai.azure.com/openai/deployments/d?api-version=1",
          false, false, 5, 0, NULL,
          "{\"model\":\"m\",\"stream\":false,\"max_completion_tokens\":5}" },
        { "http://127.0.0.1:8080/v1", false, false, 5, 3, NULL,
          "{\"model\":\"m\",\"stream\":false,\"max_tokens\":5,\"n\":3}" },
        { "https://api.openai.com.evil.example/v1", false, false, 5, 1, NULL,
          "{\"model\":\"m\",\"stream\":false,\"max_tokens\":5}" },
        { "http://127.0.0.1:8080/v1", true, true, 0, 0, NULL,
          "{\"model\":\"m\",\"stream\":true}" },
        { "http://127.0.0.1:8080/v1", true, false, 9, 2,
          "{\"model\":\"other\",\"stream_options\":{},\"max_tokens\":1,"
          "\"n\":1,\"seed\":4}",
          "{\"stream\":true,\"model\":\"other\",\"stream_options\":{},"
          "\"max_tokens\":1,\"n\":1,\"seed\":4}" },
        { "http://127.0.0.1:8080/v1", false, false, 0, 0, "{ }",
          "{\"model\":\"m\",\"stream\":false}" },
    };
    size_t i;

    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        llmcb_recording rec = recording(HELLO, LLMCB_REPLAY_CLOSE);
        talk t;

        talk_replay(&t, &rec, 1);
        t.d.base_url = cases[i].base;
        t.d.streaming = cases[i].streaming;
        t.d.no_usage = cases[i].no_usage;
        t.d.max_tokens = cases[i].max_tokens;
        t.d.n = cases[i].n;
        t.d.extra = cases[i].extra;
        talk_ask(&t);
        CHECK_STR(t.s.params, cases[i].want);
        CHECK(!strstr(t.s.params, "null"));
        talk_end(&t);
    }
}

TEST(bad_descriptors)
{
    static const struct {
        const char *model, *tools, *extra;
        llmcb_code code;
    } cases[] = {
        { "m", "{}", NULL, LLMCB_EINVAL },
        { "m", "[", NULL, LLMCB_EINVAL },
        { "m", "[] x", NULL, LLMCB_EINVAL },
        { "m", NULL, "[]", LLMCB_EINVAL },
        { "m", NULL, "{\"a\":}", LLMCB_EINVAL },
        { "m", NULL, "{\"a\":\"\xFF\"}", LLMCB_EINVAL },
        { "\xC3", NULL, NULL, LLMCB_EUTF8 },
    };
    size_t i;

    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        llmcb_recording rec = recording(HELLO, LLMCB_REPLAY_CLOSE);
        talk t;

        talk_replay(&t, &rec, 1);
        t.d.model = cases[i].model;
        t.d.tools = cases[i].tools;
        t.d.extra = cases[i].extra;
        CHECK_INT(talk_ask(&t), cases[i].code);
        CHECK_INT(llmcb_chat_error(t.chat)->code, cases[i].code);
        CHECK_INT(t.s.n_start, 0);
        talk_end(&t);
    }
}

/* Lists and labels that are NULL, and headers: the chat says so, and so does
 * each call; the first thing that is wrong is what is told. */
TEST(bad_lists)
{
    static const char *const tags[] = { "a", NULL };
    static const llmcb_pair pairs[] = { { "k", NULL }, { NULL, "v" } };
    int i;

    for (i = 0; i < 10; i++) {
        llmcb_recording rec = recording(HELLO, LLMCB_REPLAY_CLOSE);
        talk t;

        talk_replay(&t, &rec, 1);
        switch (i) {
        case 0: t.d.callbacks = NULL; break;
        case 1: t.d.n_tags = 1; break;
        case 2: t.d.n_metadata = 1; break;
        case 3: t.d.n_headers = 1; break;
        case 4: t.d.tags = tags, t.d.n_tags = 2; break;
        case 5:
        case 6: t.d.metadata = &pairs[i - 5], t.d.n_metadata = 1; break;
        case 7:
        case 8: t.d.headers = &pairs[i - 7], t.d.n_headers = 1; break;
        default: /* the tags are first */
            t.d.tags = tags, t.d.n_tags = 2;
            t.d.extra = "[";
            break;
        }
        CHECK_INT(talk_ask(&t), LLMCB_EINVAL);
        CHECK_INT(llmcb_chat_error(t.chat)->code, LLMCB_EINVAL);
        CHECK(!!strstr(llmcb_chat_error(t.chat)->message, "list is NULL") ==
              (i < 4));
        CHECK(!!strstr(llmcb_chat_error(t.chat)->message, "tag or metadata") ==
              ((i > 3 && i < 7) || i == 9));
        CHECK_INT(t.s.n_start, 0);
        talk_end(&t);
    }
    CHECK(llmcb_chat_new(NULL, NULL) == NULL);
    CHECK_INT(llmcb_chat_error(NULL)->code, LLMCB_ENOMEM);
    CHECK(llmcb_chat_batch(NULL, NULL, 0, NULL) == NULL);
}

/* What a call adds to the request must be an object, too. */
TEST(bad_extra_of_a_call)
{
    static const char *const extras[] = { "[]", "1", "{", "{} {}", "x" };
    llmcb_recording rec = recording(HELLO, LLMCB_REPLAY_CLOSE);
    llmcb_config config;
    size_t i;
    talk t;

    talk_replay(&t, &rec, 1);
    t.chat = llmcb_chat_new(t.loop, &t.d);
    memset(&config, 0, sizeof config);
    for (i = 0; i < sizeof extras / sizeof *extras; i++) {
        config.extra = extras[i];
        t.op = llmcb_chat_generate(t.chat, &question, 1, &config);
        CHECK_INT(llmcb_op_wait(t.op), LLMCB_EINVAL);
        CHECK(strstr(llmcb_op_error(t.op)->message, "extra"));
        llmcb_op_free(t.op);
    }
    CHECK_INT(t.s.n_start, 0);
    config.extra = "{\"seed\":1}";
    t.op = llmcb_chat_generate(t.chat, &question, 1, &config);
    CHECK_INT(llmcb_op_wait(t.op), LLMCB_OK);
    talk_end(&t);
}

/* ---- transports of the program ------------------------------------------- */

TEST(a_transport_needs_its_four_functions)
{
    mute m;
    talk t;
    int i;

    talk_init(&t, true);
    for (i = 0; i < 4; i++) {
        memset(&m, 0, sizeof m);
        m.base.start = mute_start;
        m.base.resume = m.base.release = mute_nothing;
        m.base.cancel = mute_cancel;
        if (i == 0) m.base.start = NULL;
        if (i == 1) m.base.resume = NULL;
        if (i == 2) m.base.release = NULL;
        if (i == 3) m.base.cancel = NULL;
        CHECK_INT(llmcb_transport_init(t.loop, &m.base), LLMCB_EINVAL);
    }
    CHECK_INT(llmcb_transport_init(NULL, &m.base), LLMCB_ENOMEM);
    CHECK_INT(llmcb_transport_init(t.loop, NULL), LLMCB_ENOMEM);
    talk_end(&t);
}

/* One that a loop does not know is refused, and so is one that it knows. */
TEST(a_transport_belongs_to_one_loop_once)
{
    llmcb_loop *other = llmcb_loop_new(NULL);
    llmcb_chat_desc desc;
    mute m[2];
    talk t;
    int i;

    talk_init(&t, true);
    memset(m, 0, sizeof m);
    memset(&desc, 0, sizeof desc);
    m[0].base.start = mute_start;
    m[0].base.resume = m[0].base.release = mute_nothing;
    m[0].base.cancel = mute_cancel;
    CHECK_INT(llmcb_transport_init(other, &m[0].base), LLMCB_OK);
    CHECK_INT(llmcb_transport_init(other, &m[0].base), LLMCB_EINVAL);
    for (i = 0; i < 2; i++) { /* another loop's, none's */
        llmcb_chat *chat;
        desc.transport = &m[i].base;
        chat = llmcb_chat_new(t.loop, &desc);
        CHECK_INT(llmcb_chat_error(chat)->code, LLMCB_EINVAL);
        CHECK(strstr(llmcb_chat_error(chat)->message, "transport"));
        t.op = llmcb_chat_generate(chat, &question, 1, NULL);
        CHECK_INT(llmcb_op_wait(t.op), LLMCB_EINVAL);
        llmcb_op_free(t.op);
        t.op = NULL;
        llmcb_chat_free(chat);
    }
    CHECK_INT(llmcb_loop_free(other), LLMCB_OK);
    talk_end(&t);
}

static void say(llmcb_exchange *x, const char *bytes)
{
    llmcb_exchange_data(x, bytes, strlen(bytes));
}

/* A piece of no bytes is nothing that anybody waits for. */
TEST(no_bytes_do_not_stop_the_clocks)
{
    mute m;
    talk t;

    talk_init(&t, true);
    mute_init(&m, t.loop);
    t.d.transport = &m.base;
    t.d.idle_ms = 100;
    t.d.max_retries = -1;
    t.chat = llmcb_chat_new(t.loop, &t.d);
    t.op = llmcb_chat_generate(t.chat, &question, 1, NULL);
    while (!m.x && !llmcb_op_done(t.op))
        llmcb_loop_run_once(t.loop, 0);
    llmcb_exchange_connected(m.x);
    llmcb_exchange_status(m.x, 200);
    say(m.x, EV("a"));
    CHECK(llmcb_exchange_data(m.x, "", 0));
    CHECK_INT(llmcb_op_wait(t.op), LLMCB_ETIMEDOUT);
    CHECK_INT(llmcb_op_error(t.op)->detail, LLMCB_DETAIL_IDLE);
    talk_end(&t);
}

/* A whole answer, more than the window holds; then another one behind its
 * end. */
static void answer_twice(void *arg)
{
    llmcb_exchange *x = ((mute *)arg)->x;
    int i;

    for (i = 0; i < 2; i++) {
        llmcb_exchange_connected(x);
        llmcb_exchange_status(x, i ? 500 : 200);
        llmcb_exchange_header(x, llmcb_text("Content-Encoding"),
                              llmcb_text(i ? "zip" : "identity"));
        CHECK_INT(llmcb_exchange_data(x, "", 0), i == 0);
        say(x, i ? EV("again") : EV("a") EV("b") EV("c") FIN);
        llmcb_exchange_end(x, i ? LLMCB_BROKEN : LLMCB_ORDERLY,
                           i ? LLMCB_EIO : LLMCB_OK, 0, "again");
    }
    llmcb_exchange_connected(NULL);
    llmcb_exchange_status(NULL, 500);
    llmcb_exchange_header(NULL, llmcb_text("a"), llmcb_text("b"));
    CHECK(!llmcb_exchange_data(NULL, "x", 1));
    llmcb_exchange_end(NULL, LLMCB_BROKEN, LLMCB_EIO, 0, "x");
}

TEST(nothing_comes_behind_the_end_of_an_exchange)
{
    mute m;
    talk t;

    talk_init(&t, true);
    mute_init(&m, t.loop);
    memset(&t.h, 0, sizeof t.h);
    t.h.async.on_chat_model_start = t.h.async.on_llm_new_token =
        t.h.async.on_llm_end = t.h.async.on_llm_error = note_slowly;
    t.h.user = &t.s;
    t.s.sleep = 1000;
    t.d.transport = &m.base;
    t.d.limits.window_events = 1;
    t.d.connect_ms = LLMCB_FOREVER;
    t.chat = llmcb_chat_new(t.loop, &t.d);
    t.op = llmcb_chat_generate(t.chat, &question, 1, NULL);
    while (!m.x) llmcb_loop_run_once(t.loop, 0);
    llmcb_loop_post(t.loop, answer_twice, &m);
    CHECK_INT(llmcb_op_wait(t.op), LLMCB_OK);
    CHECK_STR(t.s.tokens, "a|b|c||");
    CHECK_INT(m.n_cancelled, 0);
    talk_end(&t);
}

/* ---- heads and first bytes ----------------------------------------------- */

TEST(what_the_head_says_of_the_body)
{
    static const struct {
        const char *bytes;
        llmcb_code code;
        int64_t wish; /* of a retry */
    } rows[] = {
        { SSE "Content-Encoding: identity\r\n\r\n" EV("a") FIN, LLMCB_OK, 0 },
        { SSE "Content-Encoding:\r\n\r\n" EV("a") FIN, LLMCB_OK, 0 },
        { SSE "Content-Encoding: gzip\r\n\r\n" EV("a") FIN, LLMCB_ECTYPE, 0 },
        { "HTTP/1.1 200 OK\r\nContent-Type: a\r\n\r\n" EV("a") FIN, LLMCB_OK,
          0 },
        { "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" EV("a") FIN,
          LLMCB_ECTYPE, 0 },
        { "HTTP/1.1 200 OK\r\nLocation: http://b/\r\n\r\n" EV("a") FIN,
          LLMCB_OK, 0 },
        /* blanks of all kinds before what says what it is */
        { "HTTP/1.1 200 OK\r\n\r\n \t\r\n{\"choices\":[{\"message\":{"
          "\"content\":\"a\"},\"finish_reason\":\"stop\"}]}", LLMCB_OK, 0 },
        { "HTTP/1.1 200 OK\r\n\r\n\n\r\t <p>", LLMCB_ECTYPE, 0 },
        { "HTTP/1.1 200 OK\r\n\r\n \t\r\n", LLMCB_ETRUNCATED, 0 },
        { FAIL("400", "Retry-After-Ms: soon\r\nRetry-After: 7\r\n"),
          LLMCB_EHTTP, 7000 },
        { FAIL("400", "Retry-After: 7\r\nRetry-After-Ms: soon\r\n"),
          LLMCB_EHTTP, 7000 },
        { FAIL("400", "Retry-After-Ms: 5\r\nRetry-After: 7\r\n"),
          LLMCB_EHTTP, 5 },
        { FAIL("302", "Location: http://b/\r\n"), LLMCB_EREDIRECT, -1 },
        { "HTTP/1.1 302 X\r\nContent-Length: 3\r\n\r\nabc", LLMCB_EREDIRECT,
          -1 },
    };
    size_t i;

    for (i = 0; i < sizeof rows / sizeof *rows; i++) {
        llmcb_recording rec = recording(rows[i].bytes, LLMCB_REPLAY_CLOSE);
        talk t;

        talk_replay(&t, &rec, 1);
        if (talk_ask(&t) != rows[i].code)
            TEST_FAIL("row %d: %s", (int)i,
                      llmcb_code_name(llmcb_op_code(t.op)));
        if (rows[i].code == LLMCB_EHTTP || rows[i].code == LLMCB_EREDIRECT)
            CHECK_INT(t.s.error.retry_after_ms, rows[i].wish);
        if (rows[i].code == LLMCB_OK) {
            llmcb_str text = llmcb_op_text(t.op);
            CHECK_STR(text.ptr, "a");
        }
        talk_end(&t);
    }
}

/* An address to go on to is told, as far as it is one; not kilobytes of it. */
TEST(long_locations_are_not_told)
{
    char *bytes = (char *)malloc(6000);
    size_t n;

    for (n = 4000; n <= 5000; n += 1000) {
        llmcb_recording rec;
        talk t;

        strcpy(bytes, "HTTP/1.1 307 X\r\nLocation: http://elsewhere/");
        while (strlen(bytes) < n) strcat(bytes, "aaaaaaaaaaaaaaaaaaaaaaaaa");
        strcat(bytes, "\r\nContent-Length: 0\r\n\r\n");
        rec = recording(bytes, LLMCB_REPLAY_CLOSE);
        talk_replay(&t, &rec, 1);
        CHECK_INT(talk_ask(&t), LLMCB_EREDIRECT);
        CHECK(!!strstr(t.s.error.message, "elsewhere") == (n < 4096));
        talk_end(&t);
    }
    free(bytes);
}

/* ---- results ------------------------------------------------------------- */

static llmcb_step no_steps(llmcb_task *t)
{
    LLMCB_BEGIN(t);
    LLMCB_END(t);
}

/* Of what is not there, or not yet, or no call. */
TEST(results_of_nothing)
{
    llmcb_recording rec = recording(HELLO, LLMCB_REPLAY_CLOSE);
    llmcb_op *task;
    talk t;

    CHECK(!llmcb_op_result(NULL)->complete);
    CHECK_INT(llmcb_op_error_at(NULL, 0)->code, llmcb_op_error(NULL)->code);
    CHECK_STR(llmcb_op_text(NULL).ptr, "");
    CHECK_INT(llmcb_op_n_prompts(NULL), 0);
    CHECK(llmcb_op_run_at(NULL, 0) == NULL);
    talk_replay(&t, &rec, 1);
    task = llmcb_task_start(t.loop, no_steps, 0, NULL);
    CHECK_INT(llmcb_op_wait(task), LLMCB_OK);
    CHECK_STR(llmcb_op_text(task).ptr, "");
    CHECK(!llmcb_op_result(task)->complete);
    CHECK_INT(llmcb_op_error_at(task, 0)->code, LLMCB_OK);
    llmcb_op_free(task);
    t.chat = llmcb_chat_new(t.loop, &t.d);
    t.op = llmcb_chat_generate(t.chat, &question, 1, NULL);
    CHECK_STR(llmcb_op_text(t.op).ptr, "");
    CHECK(llmcb_op_error_at(t.op, 0) == llmcb_op_error(t.op));
    CHECK_INT(llmcb_op_wait(t.op), LLMCB_OK);
    CHECK_STR(llmcb_op_text(t.op).ptr, "Hello");
    CHECK_STR(llmcb_op_result_at(t.op, 0)->generations[0].text.ptr, "Hello");
    CHECK(!llmcb_op_result_at(t.op, 1)->complete);
    CHECK_INT(llmcb_op_error_at(t.op, 0)->code, LLMCB_OK);
    CHECK(llmcb_op_error_at(t.op, 1) == llmcb_op_error(t.op));
    CHECK(llmcb_op_run_at(t.op, 1) == NULL);
    talk_end(&t);
}

static char *printed(const llmcb_result *result, llmcb_str s)
{
    static char text[2048];
    FILE *f = tmpfile();
    size_t n;

    if (!f) abort();
    if (result)
        llmcb_result_print(result, f);
    else
        llmcb_str_print(s, f);
    rewind(f);
    n = fread(text, 1, sizeof text - 1, f);
    text[n] = '\0';
    fclose(f);
    return text;
}

/* What could speak to a terminal, or turn a line around, is spelled. */
TEST(printing_is_safe)
{
    static const struct {
        const char *s, *want;
    } rows[] = {
        { "", "" },
        { "a\n\tb", "a\n\tb" },
        { "\x1B[2J\x07\x7F\r", "\\x1b[2J\\x07\\x7f\\x0d" },
        { "\xC2\x7F\xC2\x80\xC2\x9F\xC2\xA0",
          "\xC2\\x7f\\u0080\\u009f\xC2\xA0" },
        { "\xC2", "\xC2" },
        { "\xE2\x80\xA9|\xE2\x80\xAA|\xE2\x80\xAE|\xE2\x80\xAF",
          "\xE2\x80\xA9|\\u202a|\\u202e|\xE2\x80\xAF" },
        { "\xE2\x81\xA5|\xE2\x81\xA6|\xE2\x81\xA9|\xE2\x81\xAA",
          "\xE2\x81\xA5|\\u2066|\\u2069|\xE2\x81\xAA" },
        { "\xE2\x82\xAC \xE2\x7F\xAA \xE2\x80", /* no such character */
          "\xE2\x82\xAC \xE2\\x7f\xAA \xE2\x80" },
        { "\xC3\xA9\xF0\x9F\x98\x80", "\xC3\xA9\xF0\x9F\x98\x80" },
    };
    llmcb_str none = { NULL, 0 };
    size_t i;

    for (i = 0; i < sizeof rows / sizeof *rows; i++)
        CHECK_STR(printed(NULL, llmcb_text(rows[i].s)), rows[i].want);
    CHECK_STR(printed(NULL, none), "");
    llmcb_str_print(llmcb_text("x"), NULL);
    llmcb_result_print(NULL, stdout);
    llmcb_result_print(llmcb_op_result(NULL), NULL);
}

TEST(results_are_printed_whole)
{
    static const char calls[] =
        "HTTP/1.1 200 OK\r\n\r\n{\"model\":\"gpt\",\"choices\":[{\"index\":0,"
        "\"message\":{\"content\":\"a\\u001b\",\"refusal\":\"no\","
        "\"tool_calls\":[{\"id\":\"1\",\"function\":{\"name\":\"f\","
        "\"arguments\":\"{}\"}}]},\"finish_reason\":\"tool_calls\"}],"
        "\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":4,"
        "\"total_tokens\":7}}";
    static const char cut[] = SSE "\r\n" EV("half");
    llmcb_recording rec[2];
    talk t;

    rec[0] = recording(calls, LLMCB_REPLAY_CLOSE);
    rec[1] = recording(cut, LLMCB_REPLAY_RESET);
    talk_replay(&t, rec, 2);
    CHECK_INT(talk_ask(&t), LLMCB_OK);
    CHECK_STR(printed(llmcb_op_result(t.op), llmcb_text("")),
              "text: a\\x1b\nrefusal: no\ntool call: f {}\n"
              "finish reason: tool_calls\nmodel name: gpt\n"
              "usage: 3 input, 4 output, 7 total tokens\n");
    CHECK_INT(talk_ask(&t), LLMCB_EIO);
    CHECK_STR(printed(llmcb_op_result(t.op), llmcb_text("")),
              "text: half\nfinish reason: none\nmodel name: \n"
              "usage: unknown\n");
    talk_end(&t);
}

/* ---- connections --------------------------------------------------------- */

#define MANY "many.test"

static int dead_port; /* nobody listens there */
static size_t n_resolved;

typedef struct test_address {
    struct addrinfo info; /* first */
    struct sockaddr_storage addr;
} test_address;

/* ::1 and a dead port before the address that lives. */
static int test_getaddrinfo(const char *host, const char *port,
                            const struct addrinfo *hints,
                            struct addrinfo **found)
{
    int i;

    if (strcmp(host, MANY) != 0)
        return getaddrinfo(host, port, hints, found);
    if (hints->ai_flags & AI_NUMERICHOST) return EAI_NONAME;
    n_resolved++;
    *found = NULL;
    for (i = 3; i-- > 0;) {
        test_address *t = (test_address *)calloc(1, sizeof *t);
        if (!t) abort();
        t->info.ai_socktype = SOCK_STREAM;
        t->info.ai_addr = (struct sockaddr *)&t->addr;
        if (i == 0) {
            struct sockaddr_in6 *a = (struct sockaddr_in6 *)&t->addr;
            a->sin6_family = AF_INET6;
            a->sin6_port = htons((uint16_t)atoi(port));
            a->sin6_addr.s6_addr[15] = 1;
            t->info.ai_addrlen = sizeof *a;
        } else {
            struct sockaddr_in *a = (struct sockaddr_in *)&t->addr;
            a->sin_family = AF_INET;
            a->sin_port = htons((uint16_t)(i == 1 ? dead_port : atoi(port)));
            a->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
            t->info.ai_addrlen = sizeof *a;
        }
        t->info.ai_family = t->addr.ss_family;
        t->info.ai_next = *found;
        t->info.ai_canonname = (char *)(uintptr_t)MANY;
        *found = &t->info;
    }
    return 0;
}

static void test_freeaddrinfo(struct addrinfo *list)
{
    /* of the system's, none has a name: that was not asked for */
    if (!list->ai_canonname) {
        freeaddrinfo(list);
        return;
    }
    while (list) {
        struct addrinfo *next = list->ai_next;
        free(list);
        list = next;
    }
}

/* A port that is bound but not listened at. */
static int bind_dead_port(void)
{
    struct sockaddr_in a;
    socklen_t len = sizeof a;
    int fd = socket(AF_INET, SOCK_STREAM, 0);

    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(fd, (struct sockaddr *)&a, sizeof a) != 0 ||
        getsockname(fd, (struct sockaddr *)&a, &len) != 0)
        abort();
    dead_port = ntohs(a.sin_port);
    return fd;
}

/* The next address is tried when one refuses. */
TEST(address_fallback)
{
    server_script s = script(HELLO, SERVER_CLOSE);
    int fd = bind_dead_port();
    char base[64];
    talk t;

    talk_sock(&t, &s, 1);
    snprintf(base, sizeof base, "http://" MANY ":%d/v1",
             server_port(t.server));
    t.d.base_url = base;
    t.d.allow_cleartext_key = true;
    n_resolved = 0;
    CHECK_INT(talk_ask(&t), LLMCB_OK);
    CHECK_INT(n_resolved, 1);
    CHECK_INT(t.s.n_start, 1);
    CHECK_INT(t.s.n_retry, 0);
    CHECK_STR(t.s.tokens, "Hel|lo||");
    CHECK_INT(server_connections(t.server), 1);
    talk_end(&t);
    close(fd);
}

/* When all refuse, it is one failure. */
TEST(address_fallback_fails)
{
    server_script s = script(HELLO, SERVER_CLOSE);
    int fd = bind_dead_port();
    char base[64];
    talk t;

    talk_sock(&t, &s, 1);
    snprintf(base, sizeof base, "http://" MANY ":%d/v1", dead_port);
    t.d.base_url = base;
    t.d.allow_cleartext_key = true;
    CHECK_INT(talk_ask(&t), LLMCB_ECONNECT);
    CHECK_INT(t.s.error.sys_errno, ECONNREFUSED);
    CHECK_INT(t.s.n_retry, 0);
    talk_end(&t);
    close(fd);
}

TEST(no_such_host)
{
    server_script s = script(HELLO, SERVER_CLOSE);
    talk t;

    talk_sock(&t, &s, 1);
    t.d.base_url = "http://no-such-host.invalid/v1";
    t.d.api_key = "";
    CHECK_INT(talk_ask(&t), LLMCB_EDNS);
    CHECK(!strstr(t.s.error.message, "HTTP"));
    talk_end(&t);
}

#define KEPT SSE "Content-Length: 74\r\n\r\n" EV("kept") DONE

/* Calls of one chat share a connection, those of another do not: another
 * chat may have another key. libcurl's pool does not tell them apart. */
static void reuse(bool curl, bool other_chat)
{
    server_script s = script(KEPT, SERVER_KEEP);
    llmcb_chat *other = NULL;
    size_t i;
    talk t;

    talk_sock(&t, &s, 1);
    if (curl) t.d.transport = llmcb_curl_transport(t.loop);
    for (i = 0; i < 3; i++) {
        CHECK_INT(talk_ask(&t), LLMCB_OK);
        CHECK_STR(t.s.tokens, "kept|");
    }
    CHECK_INT(server_requests(t.server), 3);
    CHECK_INT(server_connections(t.server), 1);
    if (other_chat) {
        other = t.chat;
        t.chat = NULL;
        CHECK_INT(talk_ask(&t), LLMCB_OK);
        CHECK_INT(server_connections(t.server), 2);
    }
    llmcb_chat_free(other);
    talk_end(&t);
}

TEST(reuse_sock)
{
    reuse(false, false);
}

TEST(reuse_sock_other_chat)
{
    reuse(false, true);
}

#ifndef LLMCB_NO_CURL
TEST(reuse_curl)
{
    reuse(true, false);
}

/* llmcb_request.identity: "connections are shared by equal ones only" */
#endif

/* Not after "Connection: close", nor of HTTP/1.0. */
TEST(no_reuse)
{
    static const char *const answers[] = {
        SSE "Connection: close\r\nContent-Length: 74\r\n\r\n" EV("kept") DONE,
        SSE "Connection: x, Close\r\nContent-Length: 74\r\n\r\n" EV("kept")
            DONE,
        "HTTP/1.0 200 OK\r\nContent-Length: 74\r\n\r\n" EV("kept") DONE
    };
    size_t i, k;

    for (i = 0; i < 3; i++) {
        server_script s = script(answers[i], SERVER_KEEP);
        talk t;

        talk_sock(&t, &s, 1);
        for (k = 0; k < 2; k++) CHECK_INT(talk_ask(&t), LLMCB_OK);
        CHECK_INT(server_connections(t.server), 2);
        CHECK(server_wait_closed(t.server, 0) != SERVER_OPEN);
        talk_end(&t);
    }
}

/* ---- the key ------------------------------------------------------------- */

/* An allocator that gives nothing back, so that what was freed can be
 * looked at. */
typedef struct kept_block {
    struct kept_block *next;
    size_t size;
    char bytes[1];
} kept_block;

static kept_block *kept;
static pthread_mutex_t kept_lock = PTHREAD_MUTEX_INITIALIZER;

static void *keep_resize(void *user, void *ptr, size_t old_size, size_t size)
{
    kept_block *b;

    (void)user;
    if (!size) return NULL;
    b = (kept_block *)calloc(1, sizeof *b + size);
    if (!b) return NULL;
    b->size = size;
    if (ptr) memcpy(b->bytes, ptr, old_size < size ? old_size : size);
    pthread_mutex_lock(&kept_lock);
    b->next = kept;
    kept = b;
    pthread_mutex_unlock(&kept_lock);
    return b->bytes;
}

static size_t kept_count(const char *what)
{
    size_t n = 0, len = strlen(what), i;

    for (kept_block *b = kept; b; b = b->next)
        for (i = 0; i + len <= b->size; i++)
            if (memcmp(b->bytes + i, what, len) == 0) n++;
    return n;
}

TEST(key_is_wiped)
{
    server_script s[3];
    llmcb_loop_desc ld;
    llmcb_chat_desc d;
    llmcb_loop *loop;
    llmcb_chat *chat;
    server *server;
    int i;

    s[0] = script(FAIL("429", "retry-after-ms: 0\r\n"), SERVER_KEEP);
    s[1] = script("", SERVER_CLOSE); /* replayed on a new connection */
    s[2] = script(KEPT, SERVER_KEEP);
    server = server_start(s, 3);
    REQUIRE(server);
    memset(&ld, 0, sizeof ld);
    ld.allocator.resize = keep_resize;
    loop = llmcb_loop_new(&ld);
    memset(&d, 0, sizeof d);
    d.base_url = server_base(server);
    d.api_key = KEY;
    d.transport = llmcb_socket_transport(loop);
    chat = llmcb_chat_new(loop, &d);
    CHECK_INT(kept_count(KEY), 1);
    for (i = 0; i < 2; i++) {
        llmcb_op *op = llmcb_chat_generate(chat, &question, 1, NULL);
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        llmcb_op_free(op);
        CHECK_INT(kept_count(KEY), 1); /* no copy of the requests' */
    }
    CHECK_INT(server_requests(server), 4);
    { /* the last user of the key is a call that outlives the chat */
        llmcb_op *op = llmcb_chat_generate(chat, &question, 1, NULL);
        llmcb_chat_free(chat);
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        llmcb_op_free(op);
    }
    CHECK_INT(kept_count(KEY), 0);
    CHECK_INT(kept_count("CANARY"), 0);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    server_stop(server);
    while (kept) {
        kept_block *next = kept->next;
        free(kept);
        kept = next;
    }
}

/* A call that is cut off while its request waits leaves no key either. */
TEST(key_is_wiped_on_cancel)
{
    server_script s = script("", SERVER_STALL);
    llmcb_loop_desc ld;
    llmcb_chat_desc d;
    llmcb_loop *loop;
    llmcb_chat *chat;
    llmcb_op *op;
    server *server = server_start(&s, 1);
    int turns;

    REQUIRE(server);
    memset(&ld, 0, sizeof ld);
    ld.allocator.resize = keep_resize;
    for (turns = 0; turns < 8; turns++) {
        int i;
        loop = llmcb_loop_new(&ld);
        memset(&d, 0, sizeof d);
        d.base_url = server_base(server);
        d.api_key = KEY;
        d.transport = llmcb_socket_transport(loop);
        chat = llmcb_chat_new(loop, &d);
        op = llmcb_chat_generate(chat, &question, 1, NULL);
        for (i = 0; i < turns; i++) llmcb_loop_run_once(loop, 0);
        llmcb_op_cancel(op);
        CHECK_INT(llmcb_op_wait(op), LLMCB_ECANCELLED);
        llmcb_op_free(op);
        llmcb_chat_free(chat);
        CHECK_INT(kept_count(KEY), 0);
        llmcb_loop_free(loop);
    }
    server_stop(server);
    while (kept) {
        kept_block *next = kept->next;
        free(kept);
        kept = next;
    }
}

/* Nor does one whose connection does not come about: the listener's queue is
 * full, and nobody takes anything from it. */
TEST(key_is_wiped_while_connecting)
{
    struct sockaddr_in a;
    socklen_t len = sizeof a;
    llmcb_loop_desc ld;
    llmcb_chat_desc d;
    llmcb_loop *loop;
    llmcb_chat *chat;
    llmcb_op *op;
    char base[64];
    int fd = socket(AF_INET, SOCK_STREAM, 0), others[8], i;

    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    REQUIRE(bind(fd, (struct sockaddr *)&a, sizeof a) == 0);
    REQUIRE(getsockname(fd, (struct sockaddr *)&a, &len) == 0);
    REQUIRE(listen(fd, 0) == 0);
    for (i = 0; i < 8; i++) {
        others[i] = socket(AF_INET, SOCK_STREAM, 0);
        fcntl(others[i], F_SETFL, O_NONBLOCK);
        connect(others[i], (struct sockaddr *)&a, sizeof a);
    }
    snprintf(base, sizeof base, "http://127.0.0.1:%d/v1", ntohs(a.sin_port));
    memset(&ld, 0, sizeof ld);
    ld.allocator.resize = keep_resize;
    loop = llmcb_loop_new(&ld);
    memset(&d, 0, sizeof d);
    d.base_url = base;
    d.api_key = KEY;
    d.transport = llmcb_socket_transport(loop);
    chat = llmcb_chat_new(loop, &d);
    op = llmcb_chat_generate(chat, &question, 1, NULL);
    for (i = 0; i < 5; i++) llmcb_loop_run_once(loop, 0);
    CHECK(kept_count(KEY) > 0); /* the chat's, and one that is to be sent */
    llmcb_op_cancel(op);
    CHECK_INT(llmcb_op_wait(op), LLMCB_ECANCELLED);
    llmcb_op_free(op);
    CHECK_INT(kept_count(KEY), 1);
    llmcb_chat_free(chat);
    CHECK_INT(kept_count(KEY), 0);
    llmcb_loop_free(loop);
    for (i = 0; i < 8; i++) close(others[i]);
    close(fd);
    while (kept) {
        kept_block *next = kept->next;
        free(kept);
        kept = next;
    }
}

/* ---- limits -------------------------------------------------------------- */

typedef struct limit_row {
    const char *name;
    size_t at; /* offset in llmcb_limits */
    size_t n;  /* what the answer needs */
    const char *bytes;
    bool json;     /* asked for and answered without streaming */
} limit_row;

#define TOOL(members) \
    "data: {\"choices\":[{\"index\":0,\"delta\":{\"tool_calls\":[{" members \
    "}]}}]}\n\n"
#define WHOLE(text)                                                     \
    "{\"choices\":[{\"index\":0,\"message\":{\"content\":\"" text       \
    "\"},\"finish_reason\":\"stop\"}]}"
#define LIMIT(member, count)                                       \
    .name = #member, .at = offsetof(llmcb_limits, member), .n = count, \
    .bytes
#define CLOSES "Connection: close\r\n\r\n"

static const limit_row limit_rows[] = {
    /* "X-Line: 0123456789" and CRLF */
    { LIMIT(header_line, 43) = SSE "X-Line: 012345678901234567890123456789012"
                                  "\r\n" CLOSES EV("a") DONE },
    /* the lines 17 + 33 + 19 + 2 */
    { LIMIT(header_block, 71) = SSE CLOSES EV("a") DONE },
    { LIMIT(header_fields, 4) =
      SSE "A: 1\r\nB: 2\r\n" CLOSES EV("a") DONE },
    /* the longest line: data: {"choices":[{...}]} */
    { LIMIT(event, 58) = SSE CLOSES EV("kept") DONE },
    { LIMIT(text, 10) = SSE CLOSES EV("01234") EV("56789") DONE },
    { LIMIT(text, 10) =
      SSE CLOSES EV("01234")
          "data: {\"choices\":[{\"delta\":{\"refusal\":\"56789\"}}]}\n\n"
          DONE },
    { LIMIT(text, 10) = SSE CLOSES WHOLE("0123456789"), .json = true },
    { LIMIT(arguments, 9) =
      SSE CLOSES TOOL("\"index\":0,\"id\":\"i\",\"function\":{\"name\":\"f\","
                      "\"arguments\":\"{\\\"a\\\"\"}")
          TOOL("\"index\":0,\"function\":{\"arguments\":\": 12}\"}") FIN DONE },
    { LIMIT(tool_calls, 2) =
      SSE CLOSES TOOL("\"index\":0,\"id\":\"i\",\"function\":{\"name\":\"f\"}")
          TOOL("\"index\":1,\"id\":\"j\",\"function\":{\"name\":\"g\"}") FIN
              DONE },
    { LIMIT(choices, 3) =
      SSE CLOSES "data: {\"choices\":[{\"index\":2,\"delta\":{\"content\":"
                 "\"x\"}}]}\n\n" DONE },
    { LIMIT(body, 74) = SSE "Content-Length: 74\r\n" CLOSES EV("kept") DONE },
    { LIMIT(body, 74) = SSE CLOSES EV("kept") DONE },
    { LIMIT(body, 74) =
      SSE "Transfer-Encoding: chunked\r\n" CLOSES "3c\r\n" EV("kept")
          "\r\ne\r\n" DONE "\r\n0\r\n\r\n" },
    { LIMIT(body, 83) = SSE CLOSES WHOLE("0123456789"), .json = true },
};

static void limit_at(const limit_row *f, size_t value, llmcb_code want,
                     int transport)
{
    llmcb_recording rec = recording(f->bytes, LLMCB_REPLAY_CLOSE);
    server_script s = script(f->bytes, SERVER_CLOSE);
    char name[64];
    talk t;

    if (transport == 0) talk_replay(&t, &rec, 1);
    else talk_sock(&t, &s, 1);
    if (transport == 2) t.d.transport = llmcb_curl_transport(t.loop);
    t.d.streaming = !f->json;
    memcpy((char *)&t.d.limits + f->at, &value, sizeof value);
    CHECK_STR(llmcb_code_name(talk_ask(&t)), llmcb_code_name(want));
    snprintf(name, sizeof name, "limits.%s", f->name);
    if (want != LLMCB_OK) CHECK(strstr(t.s.error.message, name));
    talk_end(&t);
}

TEST(limits)
{
    size_t i;
    int transport, n_transports = 3;

#ifdef LLMCB_NO_CURL
    n_transports = 2;
#endif
    for (i = 0; i < sizeof limit_rows / sizeof *limit_rows; i++)
        for (transport = 0; transport < n_transports; transport++) {
            const limit_row *f = &limit_rows[i];
            int before = test_failures_here;
            limit_at(f, f->n, LLMCB_OK, transport);
            limit_at(f, f->n - 1, LLMCB_ELIMIT, transport);
            if (before != test_failures_here)
                TEST_FAIL("row %lu, limits.%s, on transport %d",
                          (unsigned long)i, f->name, transport);
        }
}

/* The body of an error answer is kept up to the limit, not refused. */
/* limits.text counts whatever is kept of an answer. */
TEST(limit_text_of_all_kinds)
{
    static const char *const members[] = {
        "\"refusal\":\"0123456789\"", "\"reasoning\":\"0123456789\"",
        "\"reasoning_content\":\"0123456789\"", "\"content\":\"0123456789\""
    };
    size_t i, n;

    for (i = 0; i < 5; i++)
        for (n = 19; n <= 20; n++) {
            char one[256], bytes[1024];
            llmcb_recording rec;
            talk t;

            if (i < 4)
                snprintf(one, sizeof one, "data: {\"choices\":[{\"index\":0,"
                         "\"delta\":{%s}}]}\n\n", members[i]);
            else /* these are kept as they stand */
                snprintf(one, sizeof one, "data: {\"choices\":[{\"index\":0,"
                         "\"delta\":{},\"logprobs\":{\"a\":1234}}]}\n\n");
            snprintf(bytes, sizeof bytes, "%s\r\n%s%s%s", SSE, one, one,
                     FIN DONE);
            rec = recording(bytes, LLMCB_REPLAY_CLOSE);
            talk_replay(&t, &rec, 1);
            t.d.limits.text = n;
            CHECK_INT(talk_ask(&t), n < 20 ? LLMCB_ELIMIT : LLMCB_OK);
            if (n < 20) CHECK(strstr(t.s.error.message, "limits.text"));
            if (test_failures_here) TEST_FAIL("kind %d, %d", (int)i, (int)n);
            talk_end(&t);
        }
}

TEST(limit_error_body)
{
    static const char body[] =
        "{\"error\":{\"type\":\"t\",\"code\":\"c\",\"message\":\"it broke\"}}";
    char bytes[256];
    size_t len = strlen(body), n;

    snprintf(bytes, sizeof bytes,
             "HTTP/1.1 400 X\r\nContent-Length: %lu\r\n\r\n%s",
             (unsigned long)len, body);
    for (n = len - 3; n <= len + 1; n++) {
        llmcb_recording rec = recording(bytes, LLMCB_REPLAY_KEEP);
        talk t;

        talk_replay(&t, &rec, 1);
        t.d.limits.error_body = n;
        CHECK_INT(talk_ask(&t), LLMCB_EHTTP);
        CHECK_INT(t.s.error.http_status, 400);
        /* one byte less than all makes no JSON value; what was whole before
         * may be said all the same */
        if (n >= len) {
            CHECK_STR(t.s.error.type, "t");
            CHECK_STR(t.s.error.provider_code, "c");
            CHECK(strstr(t.s.error.message, "it broke"));
        }
        talk_end(&t);
    }
}

/* A raised limit never makes a failure of a success, "no limit" included. */
TEST(limits_raised)
{
    llmcb_recording rec = recording(HELLO, LLMCB_REPLAY_CLOSE);
    talk t;
    size_t i;

    for (i = 0; i < 2; i++) {
        size_t v = i ? SIZE_MAX : SIZE_MAX / 2;
        talk_replay(&t, &rec, 1);
        t.d.limits.header_line = t.d.limits.header_block =
            t.d.limits.header_fields = t.d.limits.event = t.d.limits.text =
                t.d.limits.arguments = t.d.limits.tool_calls =
                    t.d.limits.choices = t.d.limits.error_body =
                        t.d.limits.body = t.d.limits.window_events =
                            t.d.limits.window_bytes = v;
        CHECK_INT(talk_ask(&t), LLMCB_OK);
        CHECK_STR(t.s.tokens, "Hel|lo||");
        talk_end(&t);
    }
}

/* ---- streaming or not ---------------------------------------------------- */

static void play_file(talk *t, const char *path, bool streaming)
{
    llmcb_replay_desc rd;

    talk_init(t, true);
    memset(&rd, 0, sizeof rd);
    rd.path = path;
    t->tr = llmcb_replay_new(t->loop, &rd);
    if (!t->tr) abort();
    t->d.transport = t->tr;
    t->d.streaming = streaming;
    CHECK_INT(talk_ask(t), LLMCB_OK);
}

TEST(streamed_or_not)
{
    const llmcb_result *a, *b;
    talk one, two;

    play_file(&one, FIXTURES "joke.usage.http", true);
    play_file(&two, FIXTURES "joke.json.http", false);
    a = llmcb_op_result(one.op);
    b = llmcb_op_result(two.op);
    CHECK(a->complete && b->complete);
    REQUIRE(a->n_generations == 1 && b->n_generations == 1);
    CHECK_STR(a->generations[0].text.ptr, b->generations[0].text.ptr);
    CHECK_INT(a->generations[0].text.len, b->generations[0].text.len);
    CHECK_STR(a->generations[0].finish_reason.ptr,
              b->generations[0].finish_reason.ptr);
    CHECK_STR(a->generations[0].refusal.ptr, b->generations[0].refusal.ptr);
    CHECK_INT(a->generations[0].n_tool_calls,
              b->generations[0].n_tool_calls);
    CHECK_STR(a->model_name.ptr, b->model_name.ptr);
    CHECK_STR(a->id.ptr, b->id.ptr);
    CHECK_STR(a->system_fingerprint.ptr, b->system_fingerprint.ptr);
    CHECK(a->usage.known && b->usage.known);
    CHECK_INT(a->usage.input_tokens, b->usage.input_tokens);
    CHECK_INT(a->usage.output_tokens, b->usage.output_tokens);
    CHECK_INT(a->usage.total_tokens, b->usage.total_tokens);
    CHECK_INT(a->usage.cached_tokens, b->usage.cached_tokens);
    CHECK_INT(a->usage.reasoning_tokens, b->usage.reasoning_tokens);
    CHECK_INT(one.s.n_tokens, 17);
    CHECK_INT(two.s.n_tokens, 0);
    CHECK_INT(one.s.n_end, 1);
    CHECK_INT(two.s.n_end, 1);
    talk_end(&one);
    talk_end(&two);
}

/* A server that streams although it was not asked to. */
TEST(streamed_unasked)
{
    talk asked, unasked;

    play_file(&asked, FIXTURES "joke.usage.http", true);
    play_file(&unasked, FIXTURES "joke.usage.http", false);
    CHECK_STR(llmcb_op_text(unasked.op).ptr, llmcb_op_text(asked.op).ptr);
    CHECK_INT(asked.s.n_tokens, 17);
    CHECK_INT(unasked.s.n_tokens, 0);
    CHECK_INT(unasked.s.n_end, 1);
    talk_end(&asked);
    talk_end(&unasked);
}

int main(int argc, char **argv)
{
    return test_main(argc, argv);
}

/* Every recorded response of tests/fixtures, over every transport and by
 * every way of asking, must make the same log of events: a text that holds
 * all that a handler can see of a run, but ids of runs, delays and messages.
 * So must every way of cutting the bytes, and what the recorder made of
 * them. What must stand in the result is pinned in a table. */
#include "impl.h"
#include "test.h"
#include "server.h"

#define FIXTURES "tests/fixtures/"
#define KEY "sk-CANARY-4f1d9b7c2e"
#define COOKIE "CANARY-COOKIE"

#if defined(__SANITIZE_THREAD__)
#define STRIDE 17 /* one thread only: there is little to find */
#else
#define STRIDE 1
#endif

/* ---- the log ------------------------------------------------------------- */

typedef struct text {
    char *p;
    size_t len, cap;
} text;

static void add(text *b, const char *p, size_t len)
{
    if (b->len + len >= b->cap) {
        b->cap = 2 * (b->len + len) + 1024;
        b->p = (char *)realloc(b->p, b->cap);
        if (!b->p) abort();
    }
    if (len) memcpy(b->p + b->len, p, len);
    b->len += len;
    b->p[b->len] = 0;
}

static void add_text(text *b, const char *s)
{
    add(b, s, strlen(s));
}

static void add_int(text *b, const char *name, long long v)
{
    char line[64];

    snprintf(line, sizeof line, " %s=%lld", name, v);
    add_text(b, line);
}

/* Quoted, so that lines stay lines and NUL bytes are seen. */
static void add_str(text *b, const char *name, llmcb_str s)
{
    char hex[8];
    size_t i, plain = 0;

    add_text(b, " ");
    add_text(b, name);
    add_text(b, "=\"");
    for (i = 0; i < s.len; i++) {
        unsigned char c = (unsigned char)s.ptr[i];
        if (c >= 0x20 && c != '"' && c != '\\') continue;
        add(b, s.ptr + plain, i - plain);
        plain = i + 1;
        snprintf(hex, sizeof hex, "\\x%02x", c);
        add_text(b, hex);
    }
    add(b, s.ptr + plain, i - plain);
    add_text(b, "\"");
    if (s.ptr[s.len] != 0) add_text(b, "(no NUL behind it)");
}

static void add_usage(text *b, const llmcb_usage *u)
{
    if (!u->known) return;
    add_int(b, "in", u->input_tokens);
    add_int(b, "out", u->output_tokens);
    add_int(b, "all", u->total_tokens);
    add_int(b, "cached", u->cached_tokens);
    add_int(b, "reasoning", u->reasoning_tokens);
}

static void add_chunk(text *b, const llmcb_chunk *c)
{
    const llmcb_parts *p = c->parts;
    size_t i;

    add_int(b, "choice", c->choice);
    add_str(b, "text", c->text);
    for (i = 0; i < p->n_tool_calls; i++) {
        add_int(b, "tool", (long long)p->tool_calls[i].index);
        add_str(b, "id", p->tool_calls[i].id);
        add_str(b, "name", p->tool_calls[i].name);
        add_str(b, "arguments", p->tool_calls[i].arguments);
    }
    if (p->refusal.len) add_str(b, "refusal", p->refusal);
    if (p->reasoning.len) add_str(b, "reasoning", p->reasoning);
    if (p->finish_reason.len) add_str(b, "finish", p->finish_reason);
    if (p->logprobs.len) add_str(b, "logprobs", p->logprobs);
    add_usage(b, &p->usage);
    add_text(b, "\n");
}

static void add_result(text *b, const llmcb_result *r)
{
    size_t i, k;

    add_int(b, "complete", r->complete);
    add_int(b, "sentinel", r->sentinel);
    add_str(b, "model", r->model_name);
    add_str(b, "id", r->id);
    add_str(b, "fingerprint", r->system_fingerprint);
    add_usage(b, &r->usage);
    add_text(b, "\n");
    for (i = 0; i < r->n_generations; i++) {
        const llmcb_generation *g = &r->generations[i];
        add_text(b, " ");
        add_str(b, "text", g->text);
        add_str(b, "refusal", g->refusal);
        add_str(b, "reasoning", g->reasoning);
        add_str(b, "finish", g->finish_reason);
        add_str(b, "logprobs", g->logprobs);
        for (k = 0; k < g->n_tool_calls; k++) {
            add_str(b, "id", g->tool_calls[k].id);
            add_str(b, "name", g->tool_calls[k].name);
            add_str(b, "arguments", g->tool_calls[k].arguments);
            add_int(b, "valid", g->tool_calls[k].valid);
        }
        add_text(b, "\n");
    }
}

static void add_error(text *b, const llmcb_error *e)
{
    add_text(b, " ");
    add_text(b, llmcb_code_name(e->code));
    add_int(b, "detail", e->detail);
    add_int(b, "status", e->http_status);
    add_int(b, "attempt", e->attempt);
    add_int(b, "retry_after", e->retry_after_ms);
    add_text(b, " type=");
    add_text(b, e->type);
    add_text(b, " code=");
    add_text(b, e->provider_code);
    add_text(b, " request=");
    add_text(b, e->request_id);
}

/* What one handler saw of one call. */
typedef struct diary {
    text log;    /* all of it */
    text chunks; /* the tokens alone */
    size_t n_tokens, n_retry, n_finish;
    int64_t delay[4];
    int status[4];
} diary;

static int diary_note(llmcb_handler *h, const llmcb_event *ev)
{
    diary *d = (diary *)h->user;
    text *b = &d->log;
    size_t i;

    if (d->n_finish) add_text(b, "BEHIND THE FINISH ");
    add_text(b, llmcb_event_name(ev->kind));
    add_int(b, "seq", (long long)ev->seq);
    if (ev->skipped) add_int(b, "skipped", (long long)ev->skipped);
    switch (ev->kind) {
    case LLMCB_CHAT_MODEL_START:
        for (i = 0; i < ev->start->n_messages; i++) {
            llmcb_str s = { ev->start->messages[i].content,
                            ev->start->messages[i].content_len };
            add_str(b, "content", s);
        }
        add_str(b, "prompt", ev->start->prompt);
        add_str(b, "params", ev->start->params);
        add_text(b, ev->start->model);
        add_text(b, "\n");
        break;
    case LLMCB_LLM_NEW_TOKEN:
        add_chunk(b, ev->token);
        add_chunk(&d->chunks, ev->token);
        d->n_tokens++;
        break;
    case LLMCB_RETRY:
        add_int(b, "attempt", ev->retry->attempt);
        add_error(b, ev->retry->error);
        add_text(b, "\n");
        if (d->n_retry < 4) {
            d->delay[d->n_retry] = ev->retry->delay_ms;
            d->status[d->n_retry] = ev->retry->error->http_status;
        }
        d->n_retry++;
        break;
    case LLMCB_LLM_END:
    case LLMCB_LLM_ERROR:
        d->n_finish++;
        if (ev->error) add_error(b, ev->error);
        add_result(b, ev->result);
        break;
    default:
        add_text(b, " UNEXPECTED\n");
        break;
    }
    return 0;
}

static void diary_free(diary *d)
{
    free(d->log.p);
    free(d->chunks.p);
    memset(d, 0, sizeof *d);
}

static const char *of(const text *b)
{
    return b->p ? b->p : "";
}

/* Says where two texts begin to differ. */
static bool same(const text *got, const text *want, const char *what)
{
    const char *g = of(got), *w = of(want), *line_g = g, *line_w = w;

    if (got->len == want->len && memcmp(g, w, got->len) == 0) return true;
    for (; *g && *g == *w; g++, w++)
        if (*g == '\n') line_g = g + 1, line_w = w + 1;
    TEST_FAIL("%s: \"%.*s\", not \"%.*s\"", what,
              (int)strcspn(line_g, "\n"), line_g, (int)strcspn(line_w, "\n"),
              line_w);
    return false;
}

/* ---- a call -------------------------------------------------------------- */

enum { GENERATE, GENERATE_STREAMING, STREAM, N_METHODS };
static const char *const method_names[] = { "generate", "streaming",
                                            "stream" };

typedef struct call {
    int method;
    diary d;
    text pulled; /* by llmcb_op_next */
    text result; /* of the operation */
    llmcb_handler h;
    llmcb_handler *callbacks[1];
    llmcb_chat *chat;
    llmcb_op *op;
} call;

static void call_start(call *c, llmcb_loop *loop, llmcb_transport *tr,
                       const char *base, int method, int n)
{
    static const llmcb_message m = { .role = LLMCB_USER,
                                     .content = "Tell me a joke" };
    llmcb_chat_desc d;

    memset(c, 0, sizeof *c);
    c->method = method;
    c->h.sync.on_chat_model_start = c->h.sync.on_llm_new_token =
        c->h.sync.on_llm_end = c->h.sync.on_llm_error = c->h.sync.on_retry =
            diary_note;
    c->h.flags = LLMCB_INLINE;
    c->h.user = &c->d;
    c->callbacks[0] = &c->h;
    memset(&d, 0, sizeof d);
    d.base_url = base ? base : "http://127.0.0.1/v1";
    d.api_key = KEY;
    d.transport = tr;
    d.streaming = method == GENERATE_STREAMING;
    if (n < 0) d.max_retries = -1; /* a call that is to fail at once */
    else d.n = n;
    d.callbacks = c->callbacks;
    d.n_callbacks = 1;
    c->chat = llmcb_chat_new(loop, &d);
    if (!tr || !c->chat) abort();
    CHECK_INT(llmcb_chat_error(c->chat)->code, LLMCB_OK);
    c->op = method == STREAM ? llmcb_chat_stream(c->chat, &m, 1, NULL)
                             : llmcb_chat_generate(c->chat, &m, 1, NULL);
}

static llmcb_code call_wait(call *c)
{
    const llmcb_chunk *chunk;
    llmcb_code code;

    while (c->method == STREAM && llmcb_op_next(c->op, &chunk))
        add_chunk(&c->pulled, chunk);
    code = llmcb_op_wait(c->op);
    add_error(&c->result, llmcb_op_error(c->op));
    add_result(&c->result, llmcb_op_result(c->op));
    CHECK_INT(llmcb_op_error(c->op)->code, code);
    if (c->method == STREAM) same(&c->pulled, &c->d.chunks, "op_next");
    CHECK_INT(c->d.n_finish, 1);
    CHECK(!strstr(of(&c->d.log), KEY));
    CHECK(!strstr(llmcb_op_error(c->op)->message, KEY));
    return code;
}

static void call_end(call *c)
{
    llmcb_op_free(c->op);
    llmcb_chat_free(c->chat);
    diary_free(&c->d);
    free(c->pulled.p);
    free(c->result.p);
}

/* ---- what is recorded, and what must come of it -------------------------- */

typedef struct expect_call {
    const char *id, *name, *arguments;
} expect_call;

typedef struct fixture {
    const char *name;
    llmcb_code code;
    size_t n_tokens; /* of a streaming call */
    const char *text, *finish;
    int n; /* choices */
    const char *text_2;
    size_t n_retry;
    int64_t in, out; /* 0: no usage */
    const char *reasoning, *refusal;
    expect_call calls[2];
    bool json; /* no stream: what each choice has is one token */
    const char *type, *provider_code;
    int status; /* of the error */
} fixture;

#define JOKE \
    "Why don't scientists trust atoms? \n\nBecause they make up everything."
#define PARIS "{\"city\": \"Paris\"}"
#define WEATHER(a) { "call_mock_weather_1", "get_weather", a }
#define TIME \
    { "call_mock_time_2", "get_time", "{\"city\": \"Paris\", \"tz\": \"CET\"}" }

static const fixture fixtures[] = {
    { .name = "content-filter", .n_tokens = 5, .text = "I was going",
      .finish = "content_filter" },
    { .name = "done-then-more", .n_tokens = 4, .text = "Before",
      .finish = "stop" },
    { .name = "error-401", .code = LLMCB_EHTTP, .status = 401,
      .type = "invalid_request_error", .provider_code = "invalid_api_key" },
    { .name = "error-429-then-ok", .n_tokens = 16, .text = JOKE,
      .finish = "stop", .n_retry = 1 },
    { .name = "error-500x2-then-ok", .n_tokens = 16, .text = JOKE,
      .finish = "stop", .n_retry = 2 },
    { .name = "error-503-html", .code = LLMCB_EHTTP, .status = 503,
      .n_retry = 2 },
    { .name = "finish-length", .n_tokens = 5, .text = "Once upon a",
      .finish = "length" },
    { .name = "joke", .n_tokens = 16, .text = JOKE, .finish = "stop" },
    { .name = "joke.json", .n_tokens = 1, .text = JOKE, .finish = "stop",
      .in = 11, .out = 14, .json = true },
    { .name = "joke.usage", .n_tokens = 17, .text = JOKE, .finish = "stop",
      .in = 11, .out = 14 },
    { .name = "json-escapes", .n_tokens = 3,
      .text = "\xF0\x9F\x98\x80 / \xC3\xA9 \b\f\t \xE2\x80\xA8",
      .finish = "stop" },
    { .name = "keepalive-comments", .n_tokens = 5, .text = "Ping pong!",
      .finish = "stop" },
    { .name = "logprobs", .n_tokens = 4, .text = "Hi!", .finish = "stop" },
    { .name = "many-events-per-chunk", .n_tokens = 5, .text = "abc",
      .finish = "stop" },
    { .name = "mid-stream-error", .code = LLMCB_EAPI, .n_tokens = 3,
      .text = "Half way", .finish = "", .type = "server_error",
      .provider_code = "", .status = 200 },
    { .name = "mid-stream-reset", .code = LLMCB_EIO, .n_tokens = 3,
      .text = "Reset", .finish = "", .status = 200 },
    { .name = "multibyte", .n_tokens = 12,
      .text = "\xEC\x95\x88\xEB\x85\x95\xED\x95\x98\xEC\x84\xB8\xEC\x9A\x94 "
              "\xE2\x80\x94 \xF0\x9F\xA7\x91\xE2\x80\x8D\xF0\x9F\x94\xAC "
              "caf\xC3\xA9 \xE6\x97\xA5\xE6\x9C\xAC\xE8\xAA\x9E "
              "\xF0\x9F\x91\x8D\xF0\x9F\x8F\xBD \xCE\xA9\xC2\xA0"
              "\xF0\x9D\x84\x9E",
      .finish = "stop" },
    { .name = "n2", .n_tokens = 9, .n = 2, .text = "Red fish",
      .text_2 = "Blue whale!", .finish = "stop" },
    { .name = "non-stream", .n_tokens = 1, .text = JOKE, .finish = "stop",
      .in = 11, .out = 14, .json = true },
    { .name = "reasoning", .n_tokens = 8, .text = "42", .finish = "stop",
      .reasoning = "Let me think." },
    { .name = "refusal", .n_tokens = 6, .text = "", .finish = "stop",
      .refusal = "I'm sorry, no." },
    { .name = "slow", .n_tokens = 6, .text = "One two three four",
      .finish = "stop" },
    { .name = "tool-call", .n_tokens = 7, .text = "",
      .finish = "tool_calls", .calls = { WEATHER("{\"city\":\"Paris\"}") } },
    { .name = "tool-call.after-tool", .n_tokens = 9,
      .text = "It is 21\xC2\xB0""C in Paris.", .finish = "stop" },
    { .name = "tool-call.usage", .n_tokens = 8, .text = "",
      .finish = "tool_calls", .calls = { WEATHER("{\"city\":\"Paris\"}") },
      .in = 82, .out = 15 },
    { .name = "two-tools", .n_tokens = 8, .text = "",
      .finish = "tool_calls", .calls = { WEATHER(PARIS), TIME } },
    { .name = "two-tools.usage", .n_tokens = 9, .text = "",
      .finish = "tool_calls", .calls = { WEATHER(PARIS), TIME }, .in = 120,
      .out = 40 },
    { .name = "usage-in-finish", .n_tokens = 3, .text = "Hi",
      .finish = "stop", .in = 5, .out = 1 },
};

#define N_FIXTURES (sizeof fixtures / sizeof *fixtures)

static void fixture_path(const fixture *f, char *out, size_t cap)
{
    snprintf(out, cap, FIXTURES "%s.http", f->name);
}

/* The pinned facts. */
static void check_call(const fixture *f, call *c, llmcb_code code)
{
    const llmcb_result *r = llmcb_op_result(c->op);
    const llmcb_error *e = llmcb_op_error(c->op);
    size_t i, n_calls = 0;

    CHECK_STR(llmcb_code_name(code), llmcb_code_name(f->code));
    CHECK_INT(c->d.n_retry, f->n_retry);
    CHECK_INT(c->d.n_tokens, c->method == GENERATE ? 0 : f->n_tokens);
    CHECK_INT(r->complete, code == LLMCB_OK);
    CHECK_INT(r->sentinel, code == LLMCB_OK && !f->json);
    CHECK_INT(e->http_status, f->status);
    if (f->type) CHECK_STR(e->type, f->type);
    if (f->provider_code) CHECK_STR(e->provider_code, f->provider_code);
    CHECK_INT(r->usage.known, f->in != 0);
    CHECK_INT(r->usage.input_tokens, f->in);
    CHECK_INT(r->usage.output_tokens, f->out);
    CHECK_INT(r->usage.total_tokens, f->in + f->out);
    if (!f->text) {
        CHECK_INT(r->n_generations, 0);
        return;
    }
    REQUIRE(r->n_generations == (f->text_2 ? 2 : 1));
    CHECK_STR(r->generations[0].text.ptr, f->text);
    CHECK_INT(r->generations[0].text.len, strlen(f->text));
    if (f->text_2) {
        CHECK_STR(r->generations[1].text.ptr, f->text_2);
        CHECK_STR(r->generations[1].finish_reason.ptr, f->finish);
    }
    CHECK_STR(r->generations[0].finish_reason.ptr, f->finish);
    CHECK_STR(r->generations[0].reasoning.ptr,
              f->reasoning ? f->reasoning : "");
    CHECK_STR(r->generations[0].refusal.ptr, f->refusal ? f->refusal : "");
    CHECK_STR(r->model_name.ptr, "gpt-4o-mini-2024-07-18");
    CHECK_STR(r->system_fingerprint.ptr, "fp_560af6e559");
    CHECK(strncmp(r->id.ptr, "chatcmpl-mock-", 14) == 0);
    while (n_calls < 2 && f->calls[n_calls].id) n_calls++;
    REQUIRE(r->generations[0].n_tool_calls == n_calls);
    for (i = 0; i < n_calls; i++) {
        const llmcb_tool_call *t = &r->generations[0].tool_calls[i];
        CHECK_STR(t->id.ptr, f->calls[i].id);
        CHECK_STR(t->name.ptr, f->calls[i].name);
        CHECK_STR(t->arguments.ptr, f->calls[i].arguments);
        CHECK(t->valid);
    }
}

/* ---- replay: the reference ----------------------------------------------- */

static llmcb_loop *virtual_loop(void)
{
    llmcb_loop_desc d;
    llmcb_loop *loop;

    memset(&d, 0, sizeof d);
    d.virtual_clock = true;
    loop = llmcb_loop_new(&d);
    if (!loop) abort();
    return loop;
}

/* One fixture by one method; the log is the caller's. */
static void reference(const fixture *f, int method, text *log, text *result)
{
    llmcb_loop *loop = virtual_loop();
    llmcb_replay_desc rd;
    char path[128];
    call c;

    fixture_path(f, path, sizeof path);
    memset(&rd, 0, sizeof rd);
    rd.path = path;
    call_start(&c, loop, llmcb_replay_new(loop, &rd), NULL, method, f->n);
    check_call(f, &c, call_wait(&c));
    if (log) {
        *log = c.d.log;
        memset(&c.d.log, 0, sizeof c.d.log);
    }
    if (result) {
        *result = c.result;
        memset(&c.result, 0, sizeof c.result);
    }
    call_end(&c);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
}

TEST(replay_pinned)
{
    size_t i;
    int m;

    for (i = 0; i < N_FIXTURES; i++) {
        text results[N_METHODS];
        int before = test_failures_here;

        for (m = 0; m < N_METHODS; m++)
            reference(&fixtures[i], m, NULL, &results[m]);
        /* asking in another way does not change what was answered */
        same(&results[GENERATE], &results[GENERATE_STREAMING], "the result");
        same(&results[STREAM], &results[GENERATE_STREAMING], "the result");
        for (m = 0; m < N_METHODS; m++) free(results[m].p);
        if (before != test_failures_here)
            TEST_FAIL("in %s", fixtures[i].name);
    }
}

/* The order of it all, once in full. */
TEST(replay_order)
{
    static const char want[] =
        "on_chat_model_start seq=1 content=\"Tell me a joke\" prompt=\"Human:"
        " Tell me a joke\" params=\"{\\x22model\\x22:\\x22gpt-4o-mini\\x22,"
        "\\x22stream\\x22:true,\\x22stream_options\\x22:{\\x22include_usage"
        "\\x22:true}}\"gpt-4o-mini\n"
        "on_llm_new_token seq=2 choice=0 text=\"\"\n"
        "on_llm_new_token seq=3 choice=0 text=\"Hi\"\n"
        "on_llm_new_token seq=4 choice=0 text=\"\" finish=\"stop\" in=5 out=1"
        " all=6 cached=0 reasoning=0\n"
        "on_llm_end seq=5 complete=1 sentinel=1 model="
        "\"gpt-4o-mini-2024-07-18\" id=\"chatcmpl-mock-usage-in-finish\""
        " fingerprint=\"fp_560af6e559\" in=5 out=1 all=6 cached=0"
        " reasoning=0\n"
        "  text=\"Hi\" refusal=\"\" reasoning=\"\" finish=\"stop\""
        " logprobs=\"\"\n";
    text log, expected = { NULL, 0, 0 };

    reference(&fixtures[N_FIXTURES - 1], GENERATE_STREAMING, &log, NULL);
    add_text(&expected, want);
    same(&log, &expected, "the log");
    free(log.p);
    free(expected.p);
}

/* Retries on the virtual clock: when, why, and nothing else. */
TEST(replay_retries)
{
    static const struct {
        const char *name;
        size_t n;
        int status;
        int64_t low[2], high[2];
    } cases[] = {
        { "error-429-then-ok", 1, 429, { 1000, 0 }, { 1000, 0 } },
        { "error-500x2-then-ok", 2, 500, { 376, 751 }, { 500, 1000 } }
    };
    size_t i, k;
    int m;

    for (i = 0; i < 2; i++)
        for (m = 0; m < N_METHODS; m++) {
            llmcb_loop *loop = virtual_loop();
            llmcb_replay_desc rd;
            char path[128];
            int64_t sum = 0;
            call c;

            snprintf(path, sizeof path, FIXTURES "%s.http", cases[i].name);
            memset(&rd, 0, sizeof rd);
            rd.path = path;
            call_start(&c, loop, llmcb_replay_new(loop, &rd), NULL, m, 1);
            CHECK_INT(call_wait(&c), LLMCB_OK);
            CHECK_INT(c.d.n_retry, cases[i].n);
            for (k = 0; k < cases[i].n; k++) {
                CHECK_INT(c.d.status[k], cases[i].status);
                CHECK(c.d.delay[k] >= cases[i].low[k] &&
                      c.d.delay[k] <= cases[i].high[k]);
                sum += c.d.delay[k];
            }
            CHECK_INT(llmcb_loop_now(loop), sum);
            call_end(&c);
            llmcb_loop_free(loop);
        }
}

/* The recorded delays pass on the virtual clock, or not at all. */
TEST(replay_delays)
{
    int no_delays;

    for (no_delays = 0; no_delays < 2; no_delays++) {
        llmcb_loop *loop = virtual_loop();
        llmcb_replay_desc rd;
        call c;

        memset(&rd, 0, sizeof rd);
        rd.path = FIXTURES "slow.http";
        rd.no_delays = no_delays;
        call_start(&c, loop, llmcb_replay_new(loop, &rd), NULL, STREAM, 1);
        CHECK_INT(call_wait(&c), LLMCB_OK);
        CHECK_INT(llmcb_loop_now(loop), no_delays ? 0 : 250);
        call_end(&c);
        llmcb_loop_free(loop);
    }
}

/* ---- every cut of every recording ---------------------------------------- */

/* A fixture in memory, of which one answer is cut. */
static void run_cut(const fixture *f, llmcb_loop *loop,
                    const server_script *scripts, size_t n, size_t which,
                    const llmcb_segment *segs, size_t n_segs, int method,
                    const text *want)
{
    llmcb_recording rec[8];
    llmcb_replay_desc rd;
    size_t i;
    call c;

    memset(rec, 0, sizeof rec);
    memset(&rd, 0, sizeof rd);
    for (i = 0; i < n; i++) {
        rec[i].bytes = scripts[i].bytes;
        rec[i].len = scripts[i].len;
        rec[i].end = scripts[i].end == SERVER_RST ? LLMCB_REPLAY_RESET
                                                  : LLMCB_REPLAY_KEEP;
    }
    rec[which].segments = segs;
    rec[which].n_segments = n_segs;
    rd.recordings = rec;
    rd.n_recordings = n;
    call_start(&c, loop, llmcb_replay_new(loop, &rd), NULL, method, f->n);
    call_wait(&c);
    if (!same(&c.d.log, want, f->name))
        TEST_FAIL("%s by %s, answer %lu cut at %lu", f->name,
                  method_names[method], (unsigned long)which + 1,
                  n_segs == 2 ? (unsigned long)segs[1].offset : 0ul);
    call_end(&c);
}

TEST(every_split)
{
    size_t i, k, j;
    int m;

    for (i = 0; i < N_FIXTURES && !test_failures_here; i++) {
        const fixture *f = &fixtures[i];
        server_script scripts[8];
        text want[N_METHODS];
        char path[128];
        size_t n;

        fixture_path(f, path, sizeof path);
        n = server_load_all(path, scripts, 8);
        for (m = 0; m < N_METHODS; m++) reference(f, m, &want[m], NULL);
        for (j = 0; j < n; j++) {
            llmcb_loop *loop = virtual_loop();
            llmcb_segment *every =
                (llmcb_segment *)calloc(scripts[j].len + 1, sizeof *every);
            llmcb_segment two[2];

            memset(two, 0, sizeof two);
            for (k = 0; k < scripts[j].len; k++) every[k].offset = k;
            for (m = 0; m < N_METHODS; m++)
                run_cut(f, loop, scripts, n, j, every, scripts[j].len, m,
                        &want[m]);
            for (k = 1; k < scripts[j].len && !test_failures_here;
                 k += STRIDE) {
                /* by turns: the bytes take the same way in all three */
                m = (int)(k % N_METHODS);
                two[1].offset = k;
                run_cut(f, loop, scripts, n, j, two, 2, m, &want[m]);
                if (k % 500 < STRIDE) { /* transports go with their loop */
                    llmcb_loop_free(loop);
                    loop = virtual_loop();
                }
            }
            llmcb_loop_free(loop);
            free(every);
        }
        for (m = 0; m < N_METHODS; m++) free(want[m].p);
        while (n) server_unload(&scripts[--n]);
    }
}

/* ---- over the wire ------------------------------------------------------- */

typedef struct road {
    const char *name;
    bool curl, unix_socket; /* the latter know no reset */
} road;

static const road roads[] = {
    { "sock", false, false },
    { "unix", false, true },
#ifndef LLMCB_NO_CURL
    { "curl", true, false },
    { "curl over unix", true, true },
#endif
};
#define N_ROADS (sizeof roads / sizeof *roads)

static char unix_dir[64];

static server *road_server(const road *r, const server_script *scripts,
                           size_t n, size_t number)
{
    char path[100];

    if (!r->unix_socket) return server_start(scripts, n);
    if (!*unix_dir) {
        snprintf(unix_dir, sizeof unix_dir, "/tmp/llmcb-test-XXXXXX");
        if (!mkdtemp(unix_dir)) abort();
    }
    snprintf(path, sizeof path, "%s/%lu", unix_dir, (unsigned long)number);
    return server_start_unix(path, scripts, n);
}

/* All roads and methods at once on one loop: the delays of retries pass
 * together, and the calls must not get into each other's way. */
static void over_the_wire(const fixture *f, bool trickle)
{
    server *servers[N_ROADS * N_METHODS] = { NULL };
    call calls[N_ROADS * N_METHODS];
    llmcb_loop *loop = llmcb_loop_new(NULL);
    llmcb_transport *sock = llmcb_socket_transport(loop);
    llmcb_transport *curl = llmcb_curl_transport(loop);
    server_script scripts[8];
    text want[N_METHODS];
    char path[128];
    size_t i, k, n;
    int m;

    fixture_path(f, path, sizeof path);
    n = server_load_all(path, scripts, 8);
    for (i = 0; trickle && i < n; i++) scripts[i].trickle = 1;
    for (m = 0; m < N_METHODS; m++) reference(f, m, &want[m], NULL);
    for (i = 0; i < N_ROADS; i++)
        for (m = 0; m < N_METHODS; m++) {
            k = i * N_METHODS + (size_t)m;
            if (roads[i].unix_socket && f->code == LLMCB_EIO) continue;
            servers[k] = road_server(&roads[i], scripts, n, k);
            if (!servers[k]) abort();
            call_start(&calls[k], loop, roads[i].curl ? curl : sock,
                       server_base(servers[k]), m, f->n);
        }
    for (i = 0; i < N_ROADS; i++)
        for (m = 0; m < N_METHODS; m++) {
            int before = test_failures_here;
            k = i * N_METHODS + (size_t)m;
            if (!servers[k]) continue;
            check_call(f, &calls[k], call_wait(&calls[k]));
            same(&calls[k].d.log, &want[m], "the log");
            CHECK_INT(server_requests(servers[k]), f->n_retry + 1);
            if (before != test_failures_here)
                TEST_FAIL("in %s by %s over %s", f->name, method_names[m],
                          roads[i].name);
        }
    for (k = 0; k < N_ROADS * N_METHODS; k++)
        if (servers[k]) call_end(&calls[k]);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    for (k = 0; k < N_ROADS * N_METHODS; k++) server_stop(servers[k]);
    for (m = 0; m < N_METHODS; m++) free(want[m].p);
    while (n) server_unload(&scripts[--n]);
    if (*unix_dir) rmdir(unix_dir);
    *unix_dir = 0;
}

TEST(wire_all)
{
    size_t i;

    for (i = 0; i < N_FIXTURES; i++) over_the_wire(&fixtures[i], false);
}

/* A byte at a time. */
TEST(wire_trickle)
{
    static const char *const names[] = { "error-401", "json-escapes", "n2",
                                         "keepalive-comments", "multibyte",
                                         "mid-stream-error", "non-stream",
                                         "tool-call" };
    size_t i, k;

    for (i = 0; i < sizeof names / sizeof *names; i++)
        for (k = 0; k < N_FIXTURES; k++)
            if (strcmp(fixtures[k].name, names[i]) == 0)
                over_the_wire(&fixtures[k], true);
}

/* ---- recording, and playing that ----------------------------------------- */

static void check_file(const char *path, bool *exists)
{
    struct stat st;
    size_t len;
    char *bytes;

    *exists = stat(path, &st) == 0;
    if (!*exists) return;
    CHECK_INT(st.st_mode & 07777, 0600);
    bytes = server_file(path, &len);
    REQUIRE(bytes);
    CHECK(!strstr(bytes, "CANARY"));
    CHECK(!strstr(bytes, "ookie"));
    CHECK(!strstr(bytes, "openai-organization"));
    free(bytes);
}

/* Puts a cookie, and a line with a key, into the head of an answer. */
static void with_cookie(server_script *s)
{
    static const char extra[] = "\r\nSet-Cookie: session=" COOKIE "\r\n"
                                "set-cookie: b=" COOKIE;
    char *end = strstr((char *)(uintptr_t)s->bytes, "\r\n"), *bytes;
    size_t at = (size_t)(end - s->bytes), n = sizeof extra - 1, i;

    bytes = (char *)malloc(s->len + n + 1);
    if (!bytes) abort();
    memcpy(bytes, s->bytes, at);
    memcpy(bytes + at, extra, n);
    memcpy(bytes + at + n, s->bytes + at, s->len - at + 1);
    free((void *)(uintptr_t)s->bytes);
    s->bytes = bytes;
    s->len += n;
    for (i = 0; i < s->n_segments; i++)
        if (s->segments[i].offset)
            ((server_segment *)(uintptr_t)s->segments)[i].offset += n;
}

static void record(const fixture *f, bool curl)
{
    char dir[] = "build/tmp-XXXXXX", path[64], file[96];
    llmcb_loop *loop = llmcb_loop_new(NULL);
    llmcb_transport *inner = curl ? llmcb_curl_transport(loop)
                                  : llmcb_socket_transport(loop);
    server_script scripts[8];
    llmcb_replay_desc rd;
    char source[128];
    text want = { NULL, 0, 0 };
    server *s;
    size_t i, n;
    call c;

    mkdir("build", 0777);
    if (!mkdtemp(dir)) abort();
    snprintf(path, sizeof path, "%s/x.http", dir);
    fixture_path(f, source, sizeof source);
    n = server_load_all(source, scripts, 8);
    for (i = 0; i < n; i++) with_cookie(&scripts[i]);
    s = server_start(scripts, n);
    if (!s) abort();
    call_start(&c, loop, llmcb_record_new(loop, inner, path), server_base(s),
               GENERATE_STREAMING, f->n);
    check_call(f, &c, call_wait(&c));
    add(&want, of(&c.d.log), c.d.log.len);
    call_end(&c);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    server_stop(s);
    while (n) server_unload(&scripts[--n]);

    loop = virtual_loop();
    memset(&rd, 0, sizeof rd);
    rd.path = path;
    call_start(&c, loop, llmcb_replay_new(loop, &rd), NULL,
               GENERATE_STREAMING, f->n);
    check_call(f, &c, call_wait(&c));
    same(&c.d.log, &want, "played again");
    call_end(&c);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    free(want.p);

    for (i = 1; i <= f->n_retry + 2; i++) {
        bool exists;
        char number[24] = "";
        if (i > 1) snprintf(number, sizeof number, "-%lu", (unsigned long)i);
        snprintf(file, sizeof file, "%s/x%s.http", dir, number);
        check_file(file, &exists);
        CHECK_INT(exists, i <= f->n_retry + 1);
        remove(file);
        snprintf(file, sizeof file, "%s/x%s.segments.json", dir, number);
        check_file(file, &exists);
        CHECK_INT(exists, i <= f->n_retry + 1);
        remove(file);
    }
    CHECK_INT(rmdir(dir), 0);
}

TEST(record_and_replay)
{
    /* those with retries take their time: once is enough */
    static const char *const on_curl[] = { "joke", "error-401", "multibyte",
                                           "mid-stream-reset", "non-stream",
                                           "two-tools.usage" };
    size_t i, k;

    for (i = 0; i < N_FIXTURES; i++) {
        int before = test_failures_here;
        if (fixtures[i].n_retry == 1 || fixtures[i].status == 503) continue;
        record(&fixtures[i], false);
        for (k = 0; k < sizeof on_curl / sizeof *on_curl; k++) {
#ifndef LLMCB_NO_CURL
            if (strcmp(on_curl[k], fixtures[i].name) == 0)
                record(&fixtures[i], true);
#endif
        }
        if (before != test_failures_here)
            TEST_FAIL("in %s", fixtures[i].name);
    }
}

/* How a faulty answer ended is part of its recording. */
TEST(record_endings)
{
#define HEAD "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
#define EVENT                                                       \
    "3c\r\ndata: {\"choices\":[{\"index\":0,\"delta\":{\"content\":" \
    "\"kept\"}}]}\n\n\r\n"
    static const struct {
        const char *bytes;
        server_end end;
        llmcb_code code;
    } cases[] = {
        { HEAD EVENT, SERVER_CLOSE, LLMCB_ETRUNCATED },
        { HEAD EVENT "0\r\n\r\n", SERVER_KEEP, LLMCB_ETRUNCATED },
        { "HTTP/1.1 200 OK\r\nContent-Le", SERVER_CLOSE, LLMCB_ETRUNCATED },
        { "", SERVER_CLOSE, LLMCB_EIO },
        { HEAD "zz\r\n", SERVER_CLOSE, LLMCB_EPROTO },
    };
    size_t i;

    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        char dir[] = "build/tmp-XXXXXX", path[64];
        int before = test_failures_here;
        llmcb_loop *loop = llmcb_loop_new(NULL);
        server_script script;
        llmcb_replay_desc rd;
        llmcb_code code;
        server *s;
        text want = { NULL, 0, 0 };
        call c;

        memset(&script, 0, sizeof script);
        script.bytes = cases[i].bytes;
        script.end = cases[i].end;
        s = server_start(&script, 1);
        mkdir("build", 0777);
        if (!s || !mkdtemp(dir)) abort();
        snprintf(path, sizeof path, "%s/x.http", dir);
        call_start(&c, loop,
                   llmcb_record_new(loop, llmcb_socket_transport(loop), path),
                   server_base(s), GENERATE_STREAMING, -1);
        code = call_wait(&c);
        CHECK_STR(llmcb_code_name(code), llmcb_code_name(cases[i].code));
        add(&want, of(&c.d.chunks), c.d.chunks.len);
        call_end(&c);
        CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
        server_stop(s);

        loop = virtual_loop();
        memset(&rd, 0, sizeof rd);
        rd.path = path;
        call_start(&c, loop, llmcb_replay_new(loop, &rd), NULL,
                   GENERATE_STREAMING, -1);
        code = call_wait(&c);
        if (i < 2) /* what was no HTTP cannot be recorded as it was */
            CHECK_STR(llmcb_code_name(code), llmcb_code_name(cases[i].code));
        else
            CHECK(code != LLMCB_OK && code != LLMCB_ETIMEDOUT);
        same(&c.d.chunks, &want, "the tokens");
        call_end(&c);
        CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
        free(want.p);
        remove(path);
        snprintf(path, sizeof path, "%s/x.segments.json", dir);
        remove(path);
        CHECK_INT(rmdir(dir), 0);
        if (before != test_failures_here)
            TEST_FAIL("in case %lu", (unsigned long)i);
    }
}

/* The recorder follows no link, and says when it cannot write. */
static size_t n_logged;

static void count_log(void *user, const char *line)
{
    (void)user;
    (void)line;
    n_logged++;
}

TEST(record_not_through_links)
{
    char dir[] = "build/tmp-XXXXXX", path[64], victim[64];
    llmcb_loop_desc ld;
    llmcb_loop *loop;
    server *s = server_start_fixture(FIXTURES "joke.http");
    struct stat st;
    FILE *f;
    call c;

    REQUIRE(s);
    mkdir("build", 0777);
    if (!mkdtemp(dir)) abort();
    snprintf(path, sizeof path, "%s/x.http", dir);
    snprintf(victim, sizeof victim, "%s/victim", dir);
    f = fopen(victim, "w");
    fputs("mine\n", f);
    fclose(f);
    REQUIRE(symlink("victim", path) == 0);
    memset(&ld, 0, sizeof ld);
    ld.log = count_log;
    n_logged = 0;
    loop = llmcb_loop_new(&ld);
    call_start(&c, loop,
               llmcb_record_new(loop, llmcb_socket_transport(loop), path),
               server_base(s), STREAM, 1);
    CHECK_INT(call_wait(&c), LLMCB_OK); /* the call does not suffer */
    call_end(&c);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    CHECK_INT(n_logged, 1);
    CHECK(stat(victim, &st) == 0 && st.st_size == 5);
    server_stop(s);
    unlink(path);
    unlink(victim);
    snprintf(path, sizeof path, "%s/x.segments.json", dir);
    unlink(path);
    CHECK_INT(rmdir(dir), 0);
}

int main(int argc, char **argv)
{
    return test_main(argc, argv);
}

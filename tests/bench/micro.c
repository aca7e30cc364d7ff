/* Micro-benchmarks: one cost at a time, no network. Prints lines of
 *
 *     MICRO name value unit
 *
 * Each is the least of several rounds: on a machine that does other things as
 * well, noise only ever adds. What can be measured through the public
 * interface is, so that the header's inside may change under it; parsers and
 * timers are called by their private names. CPU time of all threads, unless
 * the name says wall. */
#include "bench.h"
#include "gen.h"

#define LLMCB_IMPLEMENTATION
#ifndef LLMCB_NO_CURL
#define LLMCB_NO_CURL
#endif
#include "llmcb.h"

#define ROUNDS 7

static const llmcb_message question = { .role = LLMCB_USER,
                                        .content = "Tell me a joke" };

static void report(const char *name, double value, const char *unit)
{
    printf("MICRO %s %.2f %s\n", name, value, unit);
    fflush(stdout);
}

static void fail(const char *what)
{
    fprintf(stderr, "micro: %s\n", what);
    exit(1);
}

/* -- a recording with so many tokens, in pieces of a read's size */

static llmcb_transport *tape(llmcb_loop *loop, unsigned tokens)
{
    static gen g;
    llmcb_recording rec = { .end = LLMCB_REPLAY_KEEP };
    llmcb_replay_desc desc = { .recordings = &rec, .n_recordings = 1,
                               .no_delays = true };
    llmcb_segment *pieces;
    llmcb_transport *tr;
    char *bytes;
    size_t i;

    if (!g.bytes) gen_init(&g, 0, GEN_CONTENT);
    if (tokens > GEN_RING) fail("too many tokens");
    bytes = (char *)malloc(g.head_len + g.at[tokens] + 2048);
    if (!bytes) fail("no memory");
    memcpy(bytes, g.head, g.head_len);
    memcpy(bytes + g.head_len, g.bytes, g.at[tokens]);
    rec.len = g.head_len + g.at[tokens];
    rec.len += gen_tail(&g, bytes + rec.len, 1024, 0, tokens, 1);
    rec.bytes = bytes;
    rec.n_segments = rec.len / 65536 + 1;
    pieces = (llmcb_segment *)calloc(rec.n_segments, sizeof *pieces);
    if (!pieces) fail("no memory");
    for (i = 0; i < rec.n_segments; i++) pieces[i].offset = i * 65536;
    rec.segments = pieces;
    tr = llmcb_replay_new(loop, &desc);
    free(pieces);
    free(bytes);
    return tr;
}

/* -- handlers that do next to nothing */

static int sync_any(llmcb_handler *h, const llmcb_event *ev)
{
    (void)ev;
    (*(uint64_t *)h->user)++;
    return 0;
}

static llmcb_step async_any(llmcb_task *t, llmcb_handler *h,
                            const llmcb_event *ev)
{
    (void)t;
    (void)ev;
    (*(uint64_t *)h->user)++;
    return LLMCB_DONE;
}

/* what: the kind, then which events: "token" or "ends" */
static void handler_init(llmcb_handler *h, const char *kind, bool ends,
                         uint64_t *count)
{
    memset(h, 0, sizeof *h);
    h->user = count;
    if (strcmp(kind, "inline") == 0) h->flags = LLMCB_INLINE;
    if (strcmp(kind, "lock") == 0) h->flags = LLMCB_AWAIT_EACH;
    if (strcmp(kind, "async") == 0) {
        if (!ends) h->async.on_llm_new_token = async_any;
        if (ends) h->async.on_llm_start = h->async.on_llm_end = async_any;
    } else {
        if (!ends) h->sync.on_llm_new_token = sync_any;
        if (ends) h->sync.on_llm_start = h->sync.on_llm_end = sync_any;
    }
}

/* The least CPU (or wall) seconds of one call that streams `tokens`, with k
 * handlers of a kind. */
static double stream_cost(const char *kind, unsigned k, bool ends,
                          unsigned tokens, unsigned calls, bool wall)
{
    llmcb_loop *loop = llmcb_loop_new(NULL);
    llmcb_handler h[10];
    llmcb_handler *list[10];
    uint64_t counts[10][8] = { { 0 } }; /* a cache line each */
    llmcb_chat_desc desc = { .base_url = "http://127.0.0.1/v1",
                             .api_key = "", .streaming = true,
                             .callbacks = list, .n_callbacks = k };
    llmcb_chat *chat;
    double least = 1e9;
    unsigned i, round;

    for (i = 0; i < k; i++) {
        handler_init(&h[i], kind, ends, counts[i]);
        list[i] = &h[i];
    }
    desc.transport = tape(loop, tokens);
    chat = llmcb_chat_new(loop, &desc);
    for (round = 0; round < ROUNDS; round++) {
        double t = wall ? bench_wall() : bench_cpu();
        for (i = 0; i < calls; i++) {
            llmcb_op *op = llmcb_chat_generate(chat, &question, 1, NULL);
            if (llmcb_op_wait(op) != LLMCB_OK) fail("a call failed");
            llmcb_op_free(op);
        }
        t = ((wall ? bench_wall() : bench_cpu()) - t) / calls;
        if (t < least) least = t;
    }
    for (i = 0; i < k; i++)
        if (!counts[i][0]) fail("a handler was not called");
    llmcb_chat_free(chat);
    llmcb_loop_free(loop);
    return least;
}

static void dispatch(void)
{
    static const char *const kinds[] = { "inline", "async", "sync" };
    static const unsigned counts[] = { 1, 3, 10 };
    const unsigned tokens = 4000, calls = 10;
    double base = stream_cost("inline", 0, false, tokens, calls, false);
    unsigned i, k;
    char name[64];

    report("parse_one_event", base / tokens * 1e9, "ns");
    for (i = 0; i < 3; i++)
        for (k = 0; k < 3; k++) {
            double t = stream_cost(kinds[i], counts[k], false, tokens, calls,
                                   false);
            snprintf(name, sizeof name, "dispatch_%s_%u", kinds[i],
                     counts[k]);
            report(name, (t - base) / tokens * 1e9, "ns");
        }
}

static void runs(void)
{
    static const char *const kinds[] = { "inline", "async", "sync" };
    double base = stream_cost("inline", 0, false, 1, 2000, false);
    double wall = stream_cost("inline", 0, false, 1, 2000, true);
    char name[64];
    unsigned i;

    report("run_start_finish_none", base * 1e6, "us");
    for (i = 0; i < 3; i++) {
        snprintf(name, sizeof name, "run_start_finish_%s", kinds[i]);
        report(name, stream_cost(kinds[i], 1, true, 1, 1000, false) * 1e6,
               "us");
    }
    report("barriers_sync_wall",
           (stream_cost("sync", 1, true, 1, 1000, true) - wall) * 1e6, "us");
    base = stream_cost("inline", 0, false, 1000, 1, true);
    report("lock_step_sync_wall",
           (stream_cost("lock", 1, false, 1000, 1, true) - base) / 1000 * 1e6,
           "us");
}

/* -- timers */

#define SLEEPERS 10000

static llmcb_loop *timer_loop;
static uint32_t timer_random = 88172645;
static uint64_t timer_fired;

static int64_t any_ms(void)
{
    return 1 + gen_next(&timer_random) % 1000;
}

static void timer_again(llmcbi_timer *t)
{
    timer_fired++;
    llmcbi_timer_start(timer_loop, t, any_ms());
}

static void timers(void)
{
    llmcb_loop_desc desc = { .virtual_clock = true };
    llmcbi_timer *t = (llmcbi_timer *)calloc(SLEEPERS, sizeof *t);
    double least = 1e9;
    int i, round;

    timer_loop = llmcb_loop_new(&desc);
    if (!t || !timer_loop) fail("no memory");
    for (i = 0; i < SLEEPERS; i++) {
        if (!llmcbi_timer_init(timer_loop, &t[i], timer_again))
            fail("no memory");
        llmcbi_timer_start(timer_loop, &t[i], any_ms());
    }
    for (round = 0; round < ROUNDS; round++) {
        uint64_t before = timer_fired;
        double s = bench_cpu();
        for (i = 0; i < 1000; i++) { /* a second */
            timer_loop->now++;
            llmcbi_run_timers(timer_loop);
        }
        s = (bench_cpu() - s) / (double)(timer_fired - before);
        if (s < least) least = s;
    }
    report("timer_expire_insert_10000", least * 1e9, "ns");
    for (i = 0; i < SLEEPERS; i++) llmcbi_timer_free(timer_loop, &t[i]);
    free(t);
    llmcb_loop_free(timer_loop);
}

static llmcb_step sleeper(llmcb_task *t)
{
    LLMCB_BEGIN(t);
    for (;;) {
        timer_fired++;
        LLMCB_AWAIT(t, llmcb_sleep(t, any_ms()));
        if (t->result != LLMCB_OK) break;
    }
    LLMCB_END(t);
}

/* The same by coroutines, loop turns and all. */
static void sleepers(void)
{
    llmcb_loop_desc desc = { .virtual_clock = true };
    llmcb_loop *loop = llmcb_loop_new(&desc);
    static llmcb_op *ops[SLEEPERS];
    double least = 1e9;
    int i, round;

    for (i = 0; i < SLEEPERS; i++)
        ops[i] = llmcb_task_start(loop, sleeper, 0, NULL);
    for (round = 0; round < ROUNDS; round++) {
        uint64_t before = timer_fired;
        double s = bench_cpu();
        int64_t end = llmcb_loop_now(loop) + 500;
        while (llmcb_loop_now(loop) < end)
            llmcb_loop_run_once(loop, LLMCB_FOREVER);
        s = (bench_cpu() - s) / (double)(timer_fired - before);
        if (s < least) least = s;
    }
    report("coroutine_sleep_10000", least * 1e9, "ns");
    for (i = 0; i < SLEEPERS; i++) llmcb_op_free(ops[i]);
    llmcb_loop_free(loop);
}

/* -- coroutines and the pool */

static llmcb_step nothing(llmcb_task *t)
{
    (void)t;
    return LLMCB_DONE;
}

static llmcb_step yields(llmcb_task *t)
{
    uint32_t *left = (uint32_t *)t->self;

    LLMCB_BEGIN(t);
    while ((*left)--) LLMCB_AWAIT(t, llmcb_sleep(t, 0));
    LLMCB_END(t);
}

static void tasks(void)
{
    llmcb_loop *loop = llmcb_loop_new(NULL);
    llmcb_op *ops[64];
    double least = 1e9, least_yield = 1e9;
    int round, i, k;

    for (round = 0; round < ROUNDS; round++) {
        uint32_t n = 20000;
        double s = bench_cpu();
        for (i = 0; i < 300; i++) {
            for (k = 0; k < 64; k++)
                ops[k] = llmcb_task_start(loop, nothing, 32, NULL);
            llmcb_loop_run(loop);
            for (k = 0; k < 64; k++) llmcb_op_free(ops[k]);
        }
        s = (bench_cpu() - s) / (300 * 64);
        if (s < least) least = s;
        s = bench_cpu();
        ops[0] = llmcb_task_start(loop, yields, 0, &n);
        llmcb_op_wait(ops[0]);
        llmcb_op_free(ops[0]);
        s = (bench_cpu() - s) / 20000;
        if (s < least_yield) least_yield = s;
    }
    report("coroutine_start_end", least * 1e9, "ns");
    report("coroutine_turn", least_yield * 1e9, "ns");
    llmcb_loop_free(loop);
}

static int job(void *arg)
{
    (void)arg;
    return 0;
}

static void pool(unsigned burst, const char *name)
{
    llmcb_loop *loop = llmcb_loop_new(NULL);
    llmcb_op *ops[64];
    unsigned i, k, n = 6400 / burst;
    double wall = 1e9, cpu = 1e9;
    char text[64];
    int round;

    for (round = 0; round < ROUNDS; round++) {
        double w = bench_wall(), c = bench_cpu();
        for (i = 0; i < n; i++) {
            for (k = 0; k < burst; k++)
                ops[k] = llmcb_offload(loop, job, NULL);
            llmcb_loop_run(loop);
            for (k = 0; k < burst; k++) llmcb_op_free(ops[k]);
        }
        w = (bench_wall() - w) / (n * burst);
        c = (bench_cpu() - c) / (n * burst);
        if (w < wall) wall = w;
        if (c < cpu) cpu = c;
    }
    snprintf(text, sizeof text, "pool_%s_wall", name);
    report(text, wall * 1e6, "us");
    snprintf(text, sizeof text, "pool_%s_cpu", name);
    report(text, cpu * 1e6, "us");
    llmcb_loop_free(loop);
}

/* -- parsers */

static double json_seconds(const char *text, size_t len, unsigned times)
{
    double least = 1e9;
    unsigned i;
    int round;

    for (round = 0; round < ROUNDS; round++) {
        double s = bench_cpu();
        for (i = 0; i < times; i++) {
            llmcbi_json j;
            llmcbi_json_type type;
            llmcbi_json_init(&j, text, len);
            while ((type = llmcbi_json_next(&j)) != LLMCBI_JSON_END)
                if (type == LLMCBI_JSON_ERROR) fail("JSON");
        }
        s = (bench_cpu() - s) / times;
        if (s < least) least = s;
    }
    return least;
}

static double sse_seconds(const char *text, size_t len, unsigned times)
{
    llmcb_loop *loop = llmcb_loop_new(NULL);
    double least = 1e9;
    unsigned i, n = 0;
    int round;

    for (round = 0; round < ROUNDS; round++) {
        double s = bench_cpu();
        for (i = 0; i < times; i++) {
            llmcbi_sse sse;
            llmcb_str event;
            const char *p = text;
            memset(&sse, 0, sizeof sse);
            sse.limit = 1 << 24;
            while (llmcbi_sse_next(&loop->alloc, &sse, &p, text + len,
                                   &event) == LLMCBI_SSE_EVENT)
                n++;
            llmcbi_sse_free(&loop->alloc, &sse);
        }
        s = (bench_cpu() - s) / times;
        if (s < least) least = s;
    }
    if (!n) fail("SSE");
    llmcb_loop_free(loop);
    return least;
}

/* One event many times over, or one with a very long text. */
static void parsers(void)
{
    static const char behind[] =
        "\"},\"logprobs\":null,\"finish_reason\":null}]}";
    const size_t big = 1 << 20;
    char *e = (char *)malloc(big + 2048), *many = (char *)malloc(big + 2048);
    char *open = e;
    size_t len, n = 0;

    if (!e || !many) fail("no memory");
    open += sprintf(open, "%s[{\"index\":0,\"delta\":{\"content\":\"",
                    GEN_BEFORE);
    len = (size_t)sprintf(open, " handler%s", behind) + (size_t)(open - e);
    report("json_small", json_seconds(e + 6, len - 6, 20000) * 1e9,
           "ns_an_event");
    memcpy(e + len, "\n\n", 2);
    while (n + len + 2 < big) {
        memcpy(many + n, e, len + 2);
        n += len + 2;
    }
    report("sse_small", sse_seconds(many, n, 20) * 1e9 / (double)(n / len),
           "ns_an_event");
    memset(open, 'x', big);
    memcpy(open + big, behind, sizeof behind);
    len = (size_t)(open - e) + big + sizeof behind - 1;
    report("json_large",
           (double)len / json_seconds(e + 6, len - 6, 20) / 1e9, "GB/s");
    memcpy(e + len, "\n\n", 2);
    report("sse_large", (double)len / sse_seconds(e, len + 2, 20) / 1e9,
           "GB/s");
    free(e);
    free(many);
}

int main(void)
{
    alarm(BENCH_LIFE_S);
    parsers();
    dispatch();
    runs();
    timers();
    sleepers();
    tasks();
    pool(1, "one_by_one");
    pool(64, "burst_64");
    return 0;
}

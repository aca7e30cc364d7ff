/* Runs and dispatch, systematically: the seven guarantees of the header's
 * first comment over all kinds of handlers, the start event and its labels,
 * batches, events of the program, configurations and the pull interface.
 * test_call.c has the scene's first tests and the regressions. Names
 * case_NNN are rows of LangChain's rules as llmcb keeps or changes them. */
/* build: -DLLMCB_NO_AGENT -DLLMCB_NO_SOCKETS */
#include "scene.h"
#include <sched.h>
#include <sys/wait.h>

/* ---- what the tests below share ----------------------------------------- */

#define RETRY_HEAD                                             \
    "HTTP/1.1 500 Oops\r\nretry-after-ms: 10\r\n"              \
    "Content-Length: 0\r\n\r\n"
#define BAD_HEAD                                               \
    "HTTP/1.1 400 Bad\r\nx-request-id: req-7\r\n"              \
    "Content-Length: 0\r\n\r\n"
#define JSON_HEAD                                              \
    "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"

static llmcb_str str(const char *s)
{
    llmcb_str r;

    r.ptr = s;
    r.len = strlen(s);
    return r;
}

/* Until no worker has anything to do. The loop stands still meanwhile, so
 * what workers were told is all that they can have done. */
static void pool_rests(scene *s)
{
    bool idle = false;

    while (!idle) {
        llmcbi_lock(s->loop);
        idle = llmcbi_pool_idle(s->loop);
        llmcbi_unlock(s->loop);
        if (!idle) sched_yield();
    }
}

/* The trace is written by workers too. */
static bool noted(const char *what)
{
    bool found;

    pthread_mutex_lock(&trace_lock);
    found = strstr(trace, what) != NULL;
    pthread_mutex_unlock(&trace_lock);
    return found;
}

static unsigned events_of(rec *r)
{
    unsigned n;

    pthread_mutex_lock(&r->m);
    n = r->events;
    pthread_mutex_unlock(&r->m);
    return n;
}

/* Turns until r has seen n events; false: it never did. */
static bool turn_to_events(scene *s, rec *r, unsigned n)
{
    long i;

    for (i = 0; i < 1000000 && events_of(r) < n; i++) turns(s, 1);
    return events_of(r) >= n;
}

/* Turns until nothing is under way. */
static void turn_to_end(scene *s)
{
    long i;

    for (i = 0; i < 1000000 && llmcb_loop_alive(s->loop); i++) turns(s, 1);
    CHECK(!llmcb_loop_alive(s->loop));
}

/* One recorder of each mode, with these flags besides. */
static void all_modes(scene *s, rec **r, unsigned flags)
{
    mode m;

    for (m = SYNC; m < N_MODES; m++) {
        r[m] = rec_new(mode_names[m], m);
        r[m]->h.flags |= flags;
        scene_add(s, r[m]);
    }
}

static void free_all(rec **r)
{
    mode m;

    for (m = SYNC; m < N_MODES; m++) free(r[m]);
}

/* Whether r was told the first words of `all` and then `last`. */
static bool told_then(const rec *r, const char *all, const char *last)
{
    size_t n = strlen(r->log), k = strlen(last);

    if (n < k + 1 || strcmp(r->log + n - k, last) != 0 ||
        r->log[n - k - 1] != '|')
        return false;
    n -= k + 1;
    return strncmp(r->log, all, n) == 0 && (all[n] == '|' || !all[n]);
}

static llmcb_op *call_config(scene *s, const llmcb_config *config)
{
    llmcb_message m;

    memset(&m, 0, sizeof m);
    m.content = "hi";
    return llmcb_chat_generate(s->chat, &m, 1, config);
}

/* n prompts "hi". */
static llmcb_op *call_batch(scene *s, size_t n, const llmcb_config *config)
{
    static const llmcb_message m = { LLMCB_USER, "hi", 0, NULL,
                                     NULL,       NULL, 0, NULL };
    llmcb_prompt prompts[24];
    size_t i;

    for (i = 0; i < n; i++) {
        prompts[i].messages = &m;
        prompts[i].n = 1;
    }
    return llmcb_chat_batch(s->chat, prompts, n, config);
}

/* A complete answer, not streamed. */
static void tape_json(scene *s, const char *json)
{
    size_t i = s->n_tapes;

    scene_tape(s, JSON_HEAD, "", 0, LLMCB_REPLAY_CLOSE);
    s->bytes[i] = (char *)realloc(s->bytes[i],
                                  strlen(JSON_HEAD) + strlen(json) + 1);
    if (!s->bytes[i]) abort();
    strcat(s->bytes[i], json);
    s->tapes[i].bytes = s->bytes[i];
    s->tapes[i].len = strlen(s->bytes[i]);
}

/* ======== 1: order ======================================================== */

/* All modes in one run, which is tried twice, with each set of flags, whether
 * the answer comes in one piece or in many, to quick and to slow handlers. */
static int act_seq(rec *r, const llmcb_event *ev)
{
    if (ev->seq != r->done + 1) r->wrong = "a gap in the numbers";
    return 0;
}

TEST(every_mode_is_told_everything_in_order)
{
    static const unsigned flags[] = { 0, LLMCB_AWAIT_EACH, LLMCB_PARALLEL,
                                      LLMCB_AWAIT_EACH | LLMCB_PARALLEL };
    size_t f, gap, slow;
    mode m;

    for (f = 0; f < 4; f++)
        for (gap = 0; gap <= 10; gap += 10)
            for (slow = 0; slow < 2; slow++) {
                scene s;
                rec *r[N_MODES];
                llmcb_op *op;
                scene_init(&s);
                scene_tape(&s, RETRY_HEAD, "", 0, LLMCB_REPLAY_KEEP);
                scene_tape(&s, OK_HEAD, "a|b|c" DONE, (int64_t)gap,
                           LLMCB_REPLAY_KEEP);
                all_modes(&s, r, flags[f]);
                for (m = SYNC; m < N_MODES; m++) {
                    r[m]->ms = slow ? 7 + m : 0;
                    r[m]->act = act_seq;
                }
                scene_open(&s);
                op = scene_call(&s);
                CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
                for (m = SYNC; m < N_MODES; m++) {
                    CHECK_STR(r[m]->log, "start|retry:1|a|b|c||end");
                    CHECK_REC(r[m]);
                }
                CHECK_INT(s.spy.requests, 2);
                llmcb_op_free(op);
                scene_close(&s);
                free_all(r);
            }
}

/* Sync functions run on the pool, all others on the loop's thread. */
static int act_thread(rec *r, const llmcb_event *ev)
{
    bool here = pthread_equal(*(pthread_t *)r->user, pthread_self()) != 0;
    bool token = ev->kind == LLMCB_LLM_NEW_TOKEN;
    bool pool = token ? r->h.sync.on_llm_new_token != NULL
                      : r->h.sync.on_llm_end != NULL;

    if (r->h.flags & LLMCB_INLINE) pool = false;
    if (here == pool) r->wrong = "on the wrong thread";
    return 0;
}

TEST(case_015_016_024_threads)
{
    scene s;
    rec *r[N_MODES];
    pthread_t self = pthread_self();
    llmcb_op *op;
    mode m;

    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a|b" DONE, 1, LLMCB_REPLAY_KEEP);
    all_modes(&s, r, 0);
    for (m = SYNC; m < N_MODES; m++) {
        r[m]->act = act_thread;
        r[m]->user = &self;
    }
    scene_open(&s);
    op = scene_call(&s);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    for (m = SYNC; m < N_MODES; m++) CHECK_REC(r[m]);
    llmcb_op_free(op);
    scene_close(&s);
    free_all(r);
}

/* Tokens are told if the answer is streamed, and it is if either the chat or
 * the call says so. */
TEST(case_053_054_tokens_or_none)
{
    int streaming, stream;

    for (streaming = 0; streaming < 2; streaming++)
        for (stream = 0; stream < 2; stream++) {
            scene s;
            rec *r = rec_new("A", ASYNC);
            llmcb_op *op;

            scene_init(&s);
            s.cd.streaming = streaming;
            if (streaming || stream)
                scene_tape(&s, OK_HEAD, "|Why| don|'t" DONE, 0,
                           LLMCB_REPLAY_KEEP);
            else
                tape_json(&s, "{\"choices\":[{\"message\":{\"content\":"
                              "\"Why don't\"},\"finish_reason\":"
                              "\"stop\"}]}");
            scene_add(&s, r);
            scene_open(&s);
            op = stream ? scene_stream(&s) : scene_call(&s);
            CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
            CHECK_STR(r->log, streaming || stream
                                  ? "start||Why| don|'t||end"
                                  : "start|end");
            CHECK_STR(llmcb_op_result(op)->generations[0].text.ptr,
                      "Why don't");
            CHECK_INT(strstr(s.spy.body, "\"stream\":true") != NULL,
                      streaming || stream);
            CHECK_REC(r);
            llmcb_op_free(op);
            scene_close(&s);
            free(r);
        }
}

/* The same for a handler that serves two chats and three calls at once: each
 * run is in order, and the sync functions are never entered twice. */
TEST(one_handler_in_two_chats)
{
    mode m;

    for (m = SYNC; m <= INLINE; m++) {
        scene s;
        rec *r = rec_new(mode_names[m], m);
        llmcb_chat *other;
        llmcb_op *ops[3];
        llmcb_message hi;
        int i;

        memset(&hi, 0, sizeof hi);
        hi.content = "hi";
        scene_init(&s);
        scene_tape(&s, OK_HEAD, "a|b|c" DONE, 3, LLMCB_REPLAY_KEEP);
        scene_add(&s, r);
        r->ms = 5;
        scene_open(&s);
        other = llmcb_chat_new(s.loop, &s.cd);
        ops[0] = scene_call(&s);
        ops[1] = llmcb_chat_generate(other, &hi, 1, NULL);
        ops[2] = llmcb_chat_stream(other, &hi, 1, NULL);
        for (i = 0; i < 3; i++) CHECK_INT(llmcb_op_wait(ops[i]), LLMCB_OK);
        CHECK_INT(r->n_runs, 3);
        CHECK_INT(r->events, 3 * 6);
        CHECK_INT(r->finishes, 3);
        if (m != ASYNC) CHECK_INT(r->peak, 1);
        CHECK_REC(r);
        for (i = 0; i < 3; i++) llmcb_op_free(ops[i]);
        llmcb_chat_free(other);
        scene_close(&s);
        free(r);
    }
}

/* Inline handlers in list order, event by event, before the others; the
 * others begin in list order. case_046: prompt by prompt. */
TEST(case_011_inline_first_and_in_list_order)
{
    static const char *const words[] = { "start", "a", "b", "c", "end" };
    unsigned lock;

    for (lock = 0; lock <= LLMCB_AWAIT_EACH; lock += LLMCB_AWAIT_EACH) {
        scene s;
        rec *n1 = rec_new("N1", ASYNC), *i1 = rec_new("I1", INLINE);
        rec *n2 = rec_new("N2", SYNC), *i2 = rec_new("I2", INLINE);
        rec *n3 = rec_new("N3", ASYNC);
        rec *in_order[5];
        llmcb_op *op;
        char x[32], y[32];
        size_t i, k;

        in_order[0] = n1;
        in_order[1] = i1;
        in_order[2] = n2;
        in_order[3] = i2;
        in_order[4] = n3;
        scene_init(&s);
        scene_tape(&s, OK_HEAD, "a|b|c" DONE, 0, LLMCB_REPLAY_KEEP);
        for (i = 0; i < 5; i++) {
            in_order[i]->h.flags |= lock;
            scene_add(&s, in_order[i]);
        }
        scene_open(&s);
        op = scene_call(&s);
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        for (k = 0; k < 5; k++) {
            sprintf(x, "I1>%s", words[k]);
            sprintf(y, "I2<%s", words[k]);
            CHECK(before(x, y));
            sprintf(x, "I2>%s", words[k]);
            for (i = 0; i < 5; i += 2) {
                sprintf(y, "%s<%s", in_order[i]->name, words[k]);
                CHECK(before(x, y));
            }
            if (k < 4) { /* by event, not by handler */
                sprintf(y, "I1<%s", words[k + 1]);
                CHECK(before(x, y));
            }
            sprintf(x, "N1<%s", words[k]);
            sprintf(y, "N3<%s", words[k]);
            CHECK(before(x, y));
        }
        for (i = 0; i < 5; i++) CHECK_REC(in_order[i]);
        llmcb_op_free(op);
        scene_close(&s);
        for (i = 0; i < 5; i++) free(in_order[i]);
    }
}

static int act_say_once(rec *r, const llmcb_event *ev)
{
    if (ev->kind == LLMCB_LLM_NEW_TOKEN && ev->token->text.len == 1 &&
        *ev->token->text.ptr == 'a')
        CHECK_INT(llmcb_run_text(ev->run, str("x")), LLMCB_OK);
    (void)r;
    return 0;
}

/* What a handler says in its event is told to inline handlers first, too,
 * also when a coroutine or a worker is ready to take it at once. */
TEST(inline_first_for_events_of_handlers)
{
    mode m;

    for (m = SYNC; m < N_MODES; m++) {
        scene s;
        rec *says = rec_new("X", m), *n = rec_new("N", ASYNC);
        rec *sync = rec_new("S", SYNC), *i = rec_new("I", INLINE);
        llmcb_op *op;

        scene_init(&s);
        scene_tape(&s, OK_HEAD, "a|b" DONE, 0, LLMCB_REPLAY_KEEP);
        scene_add(&s, says);
        scene_add(&s, n);
        scene_add(&s, sync);
        scene_add(&s, i);
        says->act = act_say_once;
        scene_open(&s);
        op = scene_call(&s);
        while (!llmcb_op_done(op)) {
            turns(&s, 1);
            pool_rests(&s);
        }
        CHECK_INT(llmcb_op_code(op), LLMCB_OK);
        CHECK(before("I>text:x", "N<text:x"));
        CHECK(before("I>text:x", "S<text:x"));
        CHECK(before("I>text:x", "X<text:x") || m == INLINE ||
              m == INLINE_TOKENS);
        CHECK_REC(says);
        CHECK_REC(n);
        CHECK_REC(sync);
        CHECK_REC(i);
        CHECK_STR(sync->log, i->log);
        llmcb_op_free(op);
        scene_close(&s);
        free(says);
        free(n);
        free(sync);
        free(i);
    }
}

/* The list is copied when the call is made. */
TEST(case_026_handlers_are_fixed_at_the_start)
{
    scene s;
    rec *a = rec_new("A", ASYNC), *b = rec_new("B", ASYNC);
    llmcb_handler *list[2];
    llmcb_config config;
    llmcb_op *op;

    memset(&config, 0, sizeof config);
    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a" DONE, 0, LLMCB_REPLAY_KEEP);
    scene_open(&s);
    list[0] = list[1] = &a->h;
    config.callbacks = list;
    config.n_callbacks = 2;
    op = call_config(&s, &config);
    list[0] = &b->h;
    list[1] = NULL;
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_STR(a->log, "start|a||end");
    CHECK_STR(b->log, "");
    llmcb_op_free(op);
    scene_close(&s);
    free(a);
    free(b);
}

/* The frame is zeroed for each event, and survives the awaits. */
static llmcb_step frame_event(llmcb_task *t, llmcb_handler *h,
                              const llmcb_event *ev)
{
    rec *r = (rec *)(void *)h;
    unsigned char *frame = (unsigned char *)t->frame;
    size_t i;

    LLMCB_BEGIN(t);
    rec_enter(r, ev);
    for (i = 0; i < h->frame_size; i++)
        if (frame[i]) r->wrong = "the frame is not zeroed";
    memset(frame, (int)ev->seq, h->frame_size);
    if (t->self != h->user) r->wrong = "self is not the handler's user";
    LLMCB_AWAIT(t, llmcb_sleep(t, 5));
    for (i = 0; i < h->frame_size; i++)
        if (frame[i] != (unsigned char)ev->seq) r->wrong = "the frame is lost";
    return rec_leave(r, ev);
    LLMCB_END(t);
}

TEST(frame_is_zeroed_for_each_event)
{
    scene s;
    rec *r = rec_new("A", ASYNC);
    llmcb_op *ops[3];
    int i;

    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a|b|c" DONE, 2, LLMCB_REPLAY_KEEP);
    scene_add(&s, r);
    r->h.frame_size = 333;
    r->h.user = &s;
    r->h.async.on_chat_model_start = r->h.async.on_llm_new_token =
        r->h.async.on_llm_end = frame_event;
    scene_open(&s);
    for (i = 0; i < 3; i++) ops[i] = scene_call(&s);
    for (i = 0; i < 3; i++) {
        CHECK_INT(llmcb_op_wait(ops[i]), LLMCB_OK);
        llmcb_op_free(ops[i]);
    }
    CHECK_INT(r->events, 3 * 6);
    CHECK_REC(r);
    scene_close(&s);
    free(r);
}

/* A handler must outlive the runs that use it, and no longer: its struct is
 * not looked at when the op of a finished run is freed. */
TEST(handler_may_go_before_its_finished_op)
{
    mode m;

    for (m = SYNC; m < N_MODES; m++) {
        scene s;
        rec *r = rec_new(mode_names[m], m);
        llmcb_op *op;

        scene_init(&s);
        scene_tape(&s, OK_HEAD, "a" DONE, 0, LLMCB_REPLAY_KEEP);
        r->h.frame_size = 100;
        scene_open(&s);
        op = scene_call_with(&s, r);
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        CHECK_STR(r->log, "start|a||end");
        memset(&r->h, 0, sizeof r->h);
        llmcb_op_free(op);
        scene_close(&s);
        free(r);
    }
}

/* ======== 2: barriers ===================================================== */

/* A worker that sits in the start of one of three prompts keeps all requests
 * from leaving, one in the last token keeps the end from being told, one in
 * the end keeps the op from being done. */
TEST(case_021_and_056_a_blocked_worker_holds_the_barrier)
{
    static const llmcb_event_kind kinds[] = { LLMCB_CHAT_MODEL_START,
                                              LLMCB_LLM_NEW_TOKEN,
                                              LLMCB_LLM_END };
    size_t k;

    for (k = 0; k < 3; k++) {
        gate g = GATE;
        scene s;
        rec *r = rec_new("S", SYNC), *a = rec_new("A", ASYNC);
        llmcb_op *op;

        scene_init(&s);
        scene_tape(&s, OK_HEAD, "a" DONE, 0, LLMCB_REPLAY_KEEP);
        scene_add(&s, r);
        scene_add(&s, a);
        r->gate = &g;
        r->gate_kind = (int)kinds[k];
        scene_open(&s);
        op = call_batch(&s, 3, NULL);
        turn_to_gate(&s, &g, 1);
        turns(&s, 30);
        CHECK_INT(s.spy.requests, k ? 3 : 0);
        CHECK_INT(count_of(a->log, "start"), 3);
        CHECK_INT(count_of(a->log, "end"), k < 2 ? 0 : 3);
        CHECK(!llmcb_op_done(op));
        gate_let(&g, ALL);
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        CHECK_INT(s.spy.requests, 3);
        CHECK_INT(r->finishes, 3);
        CHECK_INT(a->finishes, 3);
        CHECK_REC(r);
        CHECK_REC(a);
        llmcb_op_free(op);
        scene_close(&s);
        free(r);
        free(a);
    }
}

/* on_retry is told before the wait, and the wait does not wait for it. */
TEST(retry_is_told_before_the_wait_and_is_no_barrier)
{
    gate g = GATE;
    scene s;
    rec *a = rec_new("A", ASYNC), *r = rec_new("S", SYNC);
    llmcb_op *op;
    const char *second;

    scene_init(&s);
    scene_tape(&s, RETRY_HEAD, "", 0, LLMCB_REPLAY_KEEP);
    scene_tape(&s, OK_HEAD, "a|b" DONE, 0, LLMCB_REPLAY_KEEP);
    scene_add(&s, a);
    scene_add(&s, r);
    a->ms = 1000;
    r->gate = &g;
    r->gate_kind = LLMCB_RETRY;
    scene_open(&s);
    op = scene_call(&s);
    turn_to_gate(&s, &g, 1); /* both are told and inside */
    CHECK(noted("A<retry:1"));
    CHECK_INT(s.spy.requests, 1);
    CHECK_INT(llmcb_clock_advance(s.loop, 10), LLMCB_OK);
    turns(&s, 30);
    CHECK_INT(s.spy.requests, 2); /* and are still inside */
    CHECK(!noted("A>retry:1"));
    CHECK(!noted("S>retry:1"));
    gate_let(&g, ALL);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    second = strstr(trace, "request");
    second = second ? strstr(second + 1, "request") : NULL;
    CHECK(second && second > strstr(trace, "A<retry:1"));
    CHECK(second && second < strstr(trace, "A>retry:1"));
    CHECK_STR(a->log, "start|retry:1|a|b||end");
    CHECK_STR(r->log, a->log);
    CHECK_REC(a);
    CHECK_REC(r);
    llmcb_op_free(op);
    scene_close(&s);
    free(a);
    free(r);
}

/* ======== 3: isolation and lock step ====================================== */

/* A worker that does not come back delays no other handler and no other run,
 * until the window is full; then the answer waits, and nothing is lost. */
TEST(blocked_handler_delays_nobody_until_the_window_is_full)
{
    enum { WINDOW = 4 };
    gate g = GATE;
    scene s;
    rec *r = rec_new("S", SYNC), *a = rec_new("A", ASYNC);
    rec *i = rec_new("I", INLINE), *t = rec_new("T", SYNC);
    rec *other = rec_new("O", SYNC);
    llmcb_op *op, *free_one;

    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a|b|c|d|e|f|g|h" DONE, 0, LLMCB_REPLAY_KEEP);
    s.cd.limits.window_events = WINDOW;
    r->gate = &g;
    r->gate_kind = LLMCB_LLM_NEW_TOKEN;
    scene_add(&s, r);
    scene_add(&s, a);
    scene_add(&s, i);
    scene_add(&s, t);
    scene_open(&s);
    op = scene_call(&s);
    turn_to_gate(&s, &g, 1);
    CHECK(turn_to_events(&s, t, 1 + WINDOW));
    turns(&s, 30);
    CHECK_STR(a->log, "start|a|b|c|d");
    CHECK_STR(i->log, "start|a|b|c|d");
    CHECK_INT(t->events, 1 + WINDOW);
    s.chat->own.n_callbacks = 0; /* a run that does without S */
    free_one = scene_call_with(&s, other);
    CHECK_INT(llmcb_op_wait(free_one), LLMCB_OK);
    CHECK_STR(other->log, "start|a|b|c|d|e|f|g|h||end");
    CHECK_INT(r->events, 2);
    CHECK(!llmcb_op_done(op));
    gate_let(&g, ALL);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_STR(r->log, other->log);
    CHECK_STR(a->log, other->log);
    CHECK_STR(i->log, other->log);
    CHECK_STR(t->log, other->log);
    CHECK_REC(r);
    CHECK_REC(a);
    CHECK_REC(i);
    CHECK_REC(t);
    llmcb_op_free(op);
    llmcb_op_free(free_one);
    scene_close(&s);
    free(r);
    free(a);
    free(i);
    free(t);
    free(other);
}

/* Without lock step a coroutine that sleeps holds nobody up either. */
TEST(case_013_sleeping_handlers_sleep_together)
{
    scene s;
    rec *a = rec_new("A", ASYNC), *b = rec_new("B", ASYNC);
    llmcb_op *op;

    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a" DONE, 0, LLMCB_REPLAY_KEEP);
    scene_add(&s, a);
    scene_add(&s, b);
    a->ms = b->ms = 100;
    scene_open(&s);
    op = scene_call(&s);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_INT(llmcb_loop_now(s.loop), 400); /* start, a, "" and end */
    llmcb_op_free(op);
    scene_close(&s);
    free(a);
    free(b);
}

/* With lock step the next event waits for that handler, of whatever mode,
 * and however many handlers ask for it. */
TEST(lock_step_of_slow_coroutines)
{
    static const char *const words[] = { "start", "a", "b", "c", "d", "end" };
    static const mode modes[] = { ASYNC, SYNC_TOKENS, ASYNC_TOKENS,
                                  INLINE_TOKENS };
    size_t i, k, gap;

    for (i = 0; i < 4; i++)
        for (gap = 0; gap < 20; gap += 15) {
            scene s;
            rec *slow = rec_new("slow", modes[i]);
            rec *slower = rec_new("more", ASYNC);
            rec *a = rec_new("A", ASYNC), *b = rec_new("S", SYNC);
            rec *c = rec_new("I", INLINE);
            llmcb_op *op;
            char x[32], y[32];

            scene_init(&s);
            scene_tape(&s, OK_HEAD, "a|b|c|d" DONE, (int64_t)gap,
                       LLMCB_REPLAY_KEEP);
            slow->h.flags |= LLMCB_AWAIT_EACH;
            slower->h.flags |= LLMCB_AWAIT_EACH;
            slow->ms = 30;
            slower->ms = 50;
            scene_add(&s, a);
            scene_add(&s, slow);
            scene_add(&s, b);
            scene_add(&s, slower);
            scene_add(&s, c);
            scene_open(&s);
            op = scene_call(&s);
            CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
            for (k = 0; k < 5; k++) {
                sprintf(x, "slow>%s", words[k]);
                sprintf(y, "A<%s", words[k + 1]);
                CHECK(before(x, y));
                *y = 'S';
                CHECK(before(x, y));
                *y = 'I';
                CHECK(before(x, y));
                sprintf(x, "more>%s", words[k]);
                CHECK(before(x, y));
                *y = 'A';
                CHECK(before(x, y));
                *y = 'S';
                CHECK(before(x, y));
            }
            CHECK_STR(a->log, "start|a|b|c|d||end");
            CHECK_STR(slow->log, a->log);
            CHECK_STR(b->log, a->log);
            CHECK_REC(slow);
            CHECK_REC(slower);
            CHECK_REC(a);
            CHECK_REC(b);
            CHECK_REC(c);
            llmcb_op_free(op);
            scene_close(&s);
            free(slow);
            free(slower);
            free(a);
            free(b);
            free(c);
        }
}

/* The same for a worker, which a gate holds in each event. */
TEST(case_020_lock_step_of_a_blocked_worker)
{
    gate g = GATE;
    scene s;
    rec *r = rec_new("S", SYNC), *a = rec_new("A", ASYNC);
    rec *i = rec_new("I", INLINE);
    llmcb_op *op;
    unsigned k;

    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a|b|c|d" DONE, 0, LLMCB_REPLAY_KEEP);
    r->h.flags |= LLMCB_AWAIT_EACH;
    r->gate = &g;
    scene_add(&s, a);
    scene_add(&s, i);
    scene_add(&s, r);
    scene_open(&s);
    op = scene_call(&s);
    for (k = 1; k <= 7; k++) {
        turn_to_gate(&s, &g, k);
        turns(&s, 20);
        CHECK_INT(a->events, k);
        CHECK_INT(i->events, k);
        gate_let(&g, 1);
    }
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_STR(r->log, "start|a|b|c|d||end");
    CHECK_REC(r);
    CHECK_REC(a);
    CHECK_REC(i);
    llmcb_op_free(op);
    scene_close(&s);
    free(r);
    free(a);
    free(i);
}

/* Events of the program are events of the run: in lock step they wait, or are
 * refused. */
TEST(lock_step_holds_for_events_of_the_program)
{
    scene s;
    rec *slow = rec_new("slow", ASYNC), *a = rec_new("A", ASYNC);
    llmcb_op *op;
    llmcb_code code;

    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a|b" DONE, 0, LLMCB_REPLAY_KEEP);
    slow->h.flags |= LLMCB_AWAIT_EACH;
    slow->ms = 50;
    scene_add(&s, slow);
    scene_add(&s, a);
    scene_open(&s);
    op = scene_call(&s);
    while (!noted("slow<a")) turns(&s, 1);
    code = llmcb_run_text(llmcb_op_run_at(op, 0), str("x"));
    CHECK(code == LLMCB_OK || code == LLMCB_EBUSY);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    if (code == LLMCB_OK) CHECK(before("slow>a", "A<text:x"));
    CHECK(before("slow>a", "A<b"));
    CHECK_REC(slow);
    CHECK_REC(a);
    llmcb_op_free(op);
    scene_close(&s);
    free(slow);
    free(a);
}

/* ... and so are the choices of an answer that came whole. */
TEST(lock_step_holds_for_the_choices_of_a_whole_answer)
{
    scene s;
    rec *slow = rec_new("slow", ASYNC), *a = rec_new("A", ASYNC);
    llmcb_op *op;

    scene_init(&s);
    tape_json(&s, "{\"choices\":[{\"index\":0,\"message\":{\"content\":\"a\"},"
                  "\"finish_reason\":\"stop\"},{\"index\":1,\"message\":"
                  "{\"content\":\"b\"},\"finish_reason\":\"stop\"}]}");
    s.cd.n = 2;
    slow->h.flags |= LLMCB_AWAIT_EACH;
    slow->ms = 50;
    scene_add(&s, slow);
    scene_add(&s, a);
    scene_open(&s);
    op = scene_call(&s);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_STR(a->log, "start|a|b|end");
    CHECK(before("slow>a", "A<b"));
    CHECK_REC(slow);
    CHECK_REC(a);
    llmcb_op_free(op);
    scene_close(&s);
    free(slow);
    free(a);
}

/* ======== 4: bounded and lossless ========================================= */

/* Two choices an event, so that some must wait inside an event. */
static const char pairs[] =
    "{\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"}},"
    "{\"index\":1,\"delta\":{\"content\":\"A\"}}]}|"
    "{\"choices\":[{\"index\":0,\"delta\":{\"content\":\"b\"}},"
    "{\"index\":1,\"delta\":{\"content\":\"B\"}}]}|"
    "{\"choices\":[{\"index\":0,\"delta\":{\"content\":\"c\"}},"
    "{\"index\":1,\"delta\":{\"content\":\"C\"}}]}|"
    "{\"choices\":[{\"index\":0,\"delta\":{\"content\":\"d\"}},"
    "{\"index\":1,\"delta\":{\"content\":\"D\"}}]}|"
    "{\"choices\":[{\"index\":1,\"delta\":{},\"finish_reason\":\"stop\"},"
    "{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}|[DONE]";

/* An inline handler sees an event when it is appended: it is never further
 * ahead of the slow one than the window. */
typedef struct ahead {
    rec *first;
    unsigned window, most;
} ahead;

static int act_ahead(rec *r, const llmcb_event *ev)
{
    ahead *a = (ahead *)r->user;
    unsigned n = events_of(a->first) - r->done;

    if (!is_finish(ev->kind) && n > a->most) a->most = n;
    return 0;
}

TEST(windows_of_one_to_eight_events)
{
    unsigned w, lock;
    int64_t ms;
    mode m;

    for (w = 1; w <= 8; w++)
        for (lock = 0; lock <= LLMCB_AWAIT_EACH; lock += LLMCB_AWAIT_EACH)
            for (ms = 0; ms < 10; ms += 9) {
                scene s;
                rec *r[N_MODES], *slow = rec_new("slow", ASYNC);
                ahead far;
                llmcb_op *op;

                scene_init(&s);
                scene_tape(&s, OK_HEAD, pairs, ms / 2, LLMCB_REPLAY_KEEP);
                s.cd.limits.window_events = w;
                s.cd.n = 2;
                all_modes(&s, r, lock);
                scene_add(&s, slow);
                far.first = r[INLINE];
                far.window = w;
                far.most = 0;
                slow->user = &far;
                slow->act = act_ahead;
                slow->ms = ms;
                scene_open(&s);
                op = scene_call(&s);
                CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
                CHECK_STR(slow->log, "start|a|A|b|B|c|C|d|D|||end");
                for (m = SYNC; m < N_MODES; m++) {
                    CHECK_STR(r[m]->log, slow->log);
                    CHECK_REC(r[m]);
                }
                CHECK(far.most <= w);
                if (ms && !lock) CHECK_INT(far.most, w); /* it was used */
                CHECK_REC(slow);
                CHECK_STR(llmcb_op_result(op)->generations[0].text.ptr,
                          "abcd");
                CHECK_STR(llmcb_op_result(op)->generations[1].text.ptr,
                          "ABCD");
                llmcb_op_free(op);
                scene_close(&s);
                free_all(r);
                free(slow);
            }
}

/* Small windows of bytes, also such that no event fits: an empty log takes
 * one of any size. */
static int act_sum(rec *r, const llmcb_event *ev)
{
    if (ev->token) *(size_t *)r->user += ev->token->text.len;
    return 0;
}

TEST(windows_of_few_bytes)
{
    static const size_t sizes[] = { 1, 100, 1024, 1500, 4096, 20000 };
    char big[5001], *pieces = (char *)malloc(4 * sizeof big);
    size_t k;
    mode m;

    REQUIRE(pieces != NULL);
    memset(big, 'x', 5000);
    big[5000] = '\0';
    sprintf(pieces, "a|b|%s|c|%s|%s|d|e" DONE, big, big, big);
    for (k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        scene s;
        rec *r[N_MODES];
        size_t sums[N_MODES];
        llmcb_op *op;

        scene_init(&s);
        scene_tape(&s, OK_HEAD, pieces, 0, LLMCB_REPLAY_KEEP);
        s.cd.limits.window_bytes = sizes[k];
        all_modes(&s, r, 0);
        for (m = SYNC; m < N_MODES; m++) {
            sums[m] = 0;
            r[m]->user = &sums[m];
            r[m]->act = act_sum;
            r[m]->ms = 5;
        }
        scene_open(&s);
        op = scene_call(&s);
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        for (m = SYNC; m < N_MODES; m++) {
            CHECK_INT(sums[m], 3 * 5000 + 5);
            CHECK_INT(r[m]->events, 11);
            CHECK_REC(r[m]);
        }
        llmcb_op_free(op);
        scene_close(&s);
        free_all(r);
    }
    free(pieces);
}

/* Bytes that are not read yet wait in the connection: a slow handler costs a
 * window, whatever the length of the answer. Empty tokens, so that the text
 * does not grow, and a segment each, so that a paused player holds none. */
TEST(memory_is_bounded_by_the_window)
{
    size_t peaks[2], round;
    mode m;

    for (m = SYNC; m <= ASYNC; m++)
        for (round = 0; round < 2; round++) {
            size_t n = round ? 8000 : 500, base;
            char *pieces = (char *)malloc(n + 64);
            gate g = GATE;
            scene s;
            rec *r = rec_new(mode_names[m], m);
            llmcb_op *op;

            REQUIRE(pieces != NULL);
            memset(pieces, '|', n);
            strcpy(pieces + n, "x" DONE);
            scene_init(&s);
            scene_tape(&s, OK_HEAD, pieces, 1, LLMCB_REPLAY_KEEP);
            s.cd.limits.window_events = 64;
            scene_add(&s, r);
            r->ms = 3;
            r->gate = &g;
            r->gate_kind = LLMCB_LLM_NEW_TOKEN;
            scene_open(&s);
            base = s.heap.bytes;
            s.heap.peak = 0;
            op = scene_call(&s);
            if (m == SYNC) {
                size_t i;
                turn_to_gate(&s, &g, 1);
                for (i = 0; i < n + 20; i++) { /* all that may come */
                    llmcb_clock_advance(s.loop, 1);
                    turns(&s, 1);
                }
                gate_let(&g, ALL);
            }
            CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
            CHECK_INT(r->events, n + 4);
            peaks[round] = s.heap.peak - base;
            llmcb_op_free(op);
            scene_close(&s);
            free(r);
            free(pieces);
            if (round) CHECK(peaks[1] < peaks[0] + 4096);
            CHECK(peaks[round] < 32768);
        }
}

/* Each error event counts what its handler missed by the cancel; who has seen
 * all has missed nothing. */
TEST(cancel_counts_what_each_handler_missed)
{
    gate g = GATE;
    scene s;
    rec *slow = rec_new("A", ASYNC), *fast = rec_new("B", ASYNC);
    rec *r = rec_new("S", SYNC), *i = rec_new("I", INLINE);
    llmcb_op *op;

    scene_init(&s);
    s.fed = true;
    slow->ms = 1000;
    r->gate = &g;
    r->gate_kind = LLMCB_LLM_NEW_TOKEN;
    scene_open(&s);
    s.chat->own.n_callbacks = 0;
    {
        llmcb_handler *list[4];
        llmcb_config config;
        memset(&config, 0, sizeof config);
        list[0] = &slow->h;
        list[1] = &fast->h;
        list[2] = &r->h;
        list[3] = &i->h;
        config.callbacks = list;
        config.n_callbacks = 4;
        op = call_config(&s, &config);
    }
    while (s.spy.requests < 1) turns(&s, 1);
    feed_head(&s);
    feed_events(&s, "a|b|c|d");
    turn_to_gate(&s, &g, 1);
    while (!noted("A<a")) turns(&s, 1);
    turns(&s, 5);
    CHECK_STR(fast->log, "start|a|b|c|d");
    llmcb_op_cancel(op);
    turns(&s, 3);
    CHECK(noted("dropped")); /* the server notices at once */
    gate_let(&g, ALL);
    CHECK_INT(llmcb_op_wait(op), LLMCB_ECANCELLED);
    CHECK_INT(llmcb_op_error(op)->detail, LLMCB_DETAIL_CALLER);
    CHECK_STR(slow->log, "start|a|error:ECANCELLED-3");
    CHECK_STR(fast->log, "start|a|b|c|d|error:ECANCELLED");
    CHECK_STR(i->log, "start|a|b|c|d|error:ECANCELLED");
    CHECK(told_then(r, "start|a|b|c|d", "error:ECANCELLED") ||
          strstr(r->log, "error:ECANCELLED-"));
    CHECK_INT(r->events + r->skipped, 6);
    CHECK_INT(slow->cancelled, 1);
    CHECK_STR(llmcb_op_result(op)->generations[0].text.ptr, "abcd");
    CHECK_REC(slow);
    CHECK_REC(fast);
    CHECK_REC(r);
    CHECK_REC(i);
    llmcb_op_free(op);
    scene_close(&s);
    free(slow);
    free(fast);
    free(r);
    free(i);
}

/* ======== 5: safe by default ============================================== */

/* Twenty runs at once, one of which keeps the handler busy. */
TEST(case_019_a_sync_handler_is_never_entered_twice)
{
    enum { RUNS = 20 };
    gate g = GATE;
    scene s;
    rec *r = rec_new("S", SYNC), *mixed = rec_new("AT", ASYNC_TOKENS);
    llmcb_op *ops[RUNS];
    int i;

    scene_init(&s);
    s.ld.workers = 8;
    scene_tape(&s, OK_HEAD, "a|b|c" DONE, 0, LLMCB_REPLAY_KEEP);
    scene_add(&s, r);
    scene_add(&s, mixed);
    r->gate = &g;
    r->gate_kind = LLMCB_CHAT_MODEL_START;
    scene_open(&s);
    for (i = 0; i < RUNS; i++) ops[i] = scene_call(&s);
    for (i = 0; i < RUNS; i++) {
        turn_to_gate(&s, &g, (unsigned)i + 1);
        turns(&s, 5);
        CHECK_INT(gate_came(&g), i + 1);
        gate_let(&g, 1);
    }
    for (i = 0; i < RUNS; i++) {
        CHECK_INT(llmcb_op_wait(ops[i]), LLMCB_OK);
        llmcb_op_free(ops[i]);
    }
    CHECK_INT(r->peak, 1);
    CHECK_INT(r->finishes, RUNS);
    CHECK_INT(r->events, RUNS * 6);
    CHECK_INT(mixed->finishes, RUNS);
    CHECK_REC(r);
    CHECK_REC(mixed);
    scene_close(&s);
    free(r);
    free(mixed);
}

/* A strand goes round its runs, and starts go first: who has just begun does
 * not wait for all tokens of those who are at it. */
TEST(a_start_does_not_wait_for_the_tokens_of_others)
{
    gate g = GATE;
    scene s;
    rec *r = rec_new("S", SYNC);
    llmcb_op *ops[2];
    char pieces[256] = "";
    const char *at;
    int i;

    for (i = 0; i < 60; i++) strcat(pieces, "t|");
    strcat(pieces, "$|[DONE]");
    scene_init(&s);
    scene_tape(&s, OK_HEAD, pieces, 0, LLMCB_REPLAY_KEEP);
    scene_add(&s, r);
    r->gate = &g;
    r->gate_kind = LLMCB_LLM_NEW_TOKEN;
    scene_open(&s);
    ops[0] = scene_call(&s);
    turn_to_gate(&s, &g, 1);
    turns(&s, 5); /* all has come, and waits for the worker */
    ops[1] = scene_call(&s);
    turns(&s, 5);
    gate_let(&g, ALL);
    for (i = 0; i < 2; i++) CHECK_INT(llmcb_op_wait(ops[i]), LLMCB_OK);
    at = strstr(r->log + 1, "start");
    CHECK(at && count_of(at, "t|") > 100);
    CHECK_INT(r->events, 2 * 63);
    CHECK_REC(r);
    for (i = 0; i < 2; i++) llmcb_op_free(ops[i]);
    scene_close(&s);
    free(r);
}

/* Two loops in two threads never meet, but in a handler that both use. */
typedef struct two_loops {
    rec *shared;
    llmcb_code code;
    size_t blocks;
    bool good;
} two_loops;

static void *run_a_loop(void *arg)
{
    two_loops *t = (two_loops *)arg;
    scene *s = (scene *)calloc(1, sizeof *s);
    rec *r[N_MODES];
    llmcb_op *op;
    mode m;
    int i;

    if (!s) abort();
    scene_init(s);
    scene_tape(s, OK_HEAD, "a|b|c|d|e" DONE, 1, LLMCB_REPLAY_KEEP);
    all_modes(s, r, 0);
    scene_add(s, t->shared);
    scene_open(s);
    t->good = true;
    for (i = 0; i < 10; i++) {
        op = scene_call(s);
        t->code = llmcb_op_wait(op);
        if (t->code != LLMCB_OK) t->good = false;
        llmcb_op_free(op);
    }
    for (m = SYNC; m < N_MODES; m++)
        if (r[m]->wrong || r[m]->finishes != 10) t->good = false;
    scene_close(s);
    free_all(r);
    free(s);
    return NULL;
}

TEST(two_loops_in_two_threads)
{
    rec *shared = rec_new("both", SYNC);
    two_loops t[2];
    pthread_t thread;

    memset(t, 0, sizeof t);
    t[0].shared = t[1].shared = shared;
    REQUIRE(pthread_create(&thread, NULL, run_a_loop, &t[1]) == 0);
    run_a_loop(&t[0]);
    pthread_join(thread, NULL);
    CHECK(t[0].good && t[1].good);
    CHECK(shared->peak <= 2);
    CHECK_INT(shared->finishes, 20);
    CHECK_REC(shared);
    free(shared);
}

/* With LLMCB_PARALLEL two runs meet inside the handler: each waits for the
 * other, so it ends only if both are in. */
TEST(case_017_parallel_handlers_meet)
{
    enum { RUNS = 20 };
    gate g = GATE;
    scene s;
    rec *r = rec_new("P", SYNC);
    llmcb_op *ops[RUNS];
    int i;

    scene_init(&s);
    s.ld.workers = 3; /* strands leave one to the others */
    scene_tape(&s, OK_HEAD, "a|b|c" DONE, 0, LLMCB_REPLAY_KEEP);
    scene_add(&s, r);
    r->h.flags |= LLMCB_PARALLEL;
    r->gate = &g;
    r->gate_kind = LLMCB_LLM_NEW_TOKEN;
    scene_open(&s);
    for (i = 0; i < RUNS; i++) ops[i] = scene_call(&s);
    turn_to_gate(&s, &g, 2);
    gate_let(&g, ALL);
    for (i = 0; i < RUNS; i++) {
        CHECK_INT(llmcb_op_wait(ops[i]), LLMCB_OK);
        llmcb_op_free(ops[i]);
    }
    CHECK_INT(r->peak, 2); /* and never more threads than there are */
    CHECK_INT(r->finishes, RUNS);
    CHECK_REC(r); /* in one run it is never entered twice */
    scene_close(&s);
    free(r);
}

/* ======== 6: exactly one finish =========================================== */

/* What ends a call under way. */
typedef enum ending_of {
    CANCEL,
    CANCEL_TWICE,
    CANCEL_BY_THREAD,
    CANCEL_BY_SIGNAL,
    FREE_OP,
    CANCEL_AND_FREE_OP,
    FREE_CHAT,
    FREE_CHAT_AND_OP,
    FREE_LOOP,
    N_ENDINGS
} ending_of;

static void *cancel_thread(void *arg)
{
    llmcb_op_cancel((llmcb_op *)arg);
    return NULL;
}

static llmcb_op *volatile of_the_signal;

static void cancel_signal(int number)
{
    (void)number;
    llmcb_op_cancel(of_the_signal);
}

static void scene_end_op(scene *s, llmcb_op **op, ending_of how)
{
    pthread_t t;

    switch (how) {
    case CANCEL_TWICE:
        llmcb_op_cancel(*op);
        turns(s, 1);
        /* fall through */
    case CANCEL:
        llmcb_op_cancel(*op);
        break;
    case CANCEL_BY_THREAD:
        CHECK_INT(pthread_create(&t, NULL, cancel_thread, *op), 0);
        pthread_join(t, NULL);
        break;
    case CANCEL_BY_SIGNAL:
        of_the_signal = *op;
        signal(SIGUSR1, cancel_signal);
        raise(SIGUSR1);
        signal(SIGUSR1, SIG_DFL);
        break;
    case CANCEL_AND_FREE_OP:
        llmcb_op_cancel(*op);
        /* fall through */
    case FREE_OP:
        llmcb_op_free(*op);
        *op = NULL;
        break;
    case FREE_CHAT_AND_OP:
        llmcb_op_free(*op);
        *op = NULL;
        /* fall through */
    case FREE_CHAT:
    case FREE_LOOP:
        llmcb_chat_free(s->chat);
        s->chat = NULL;
        if (how != FREE_LOOP) break;
        *op = NULL;
        CHECK_INT(llmcb_loop_free(s->loop), LLMCB_OK);
        s->loop = NULL;
        break;
    case N_ENDINGS:
    default:
        break;
    }
}

#define WORDS "start|retry:1|a|b|c|"

/* false: the call was over before that turn. */
static bool ended_in_turn(ending_of how, int turn, unsigned flags, bool calm)
{
    scene s;
    rec *r[N_MODES];
    llmcb_op *op;
    llmcb_code code = LLMCB_ECANCELLED;
    bool over;
    int i;
    mode m;

    scene_init(&s);
    scene_tape(&s, RETRY_HEAD, "", 0, LLMCB_REPLAY_KEEP);
    scene_tape(&s, OK_HEAD, "a|b|c" DONE, 3, LLMCB_REPLAY_KEEP);
    s.cd.limits.window_events = 3;
    all_modes(&s, r, flags);
    r[ASYNC]->ms = 7;
    r[SYNC_TOKENS]->ms = 2;
    scene_open(&s);
    op = scene_call(&s);
    for (i = 0; i < turn && !llmcb_op_done(op); i++) {
        turns(&s, 1);
        if (calm) pool_rests(&s); /* else it may be anywhere */
    }
    over = llmcb_op_done(op);
    scene_end_op(&s, &op, how);
    if (op) {
        code = llmcb_op_wait(op);
        CHECK(code == LLMCB_OK || code == LLMCB_ECANCELLED);
        if (how == FREE_CHAT || over) CHECK_INT(code, LLMCB_OK);
        else if (calm) CHECK_INT(code, LLMCB_ECANCELLED);
    } else if (s.loop) {
        turn_to_end(&s);
    }
    for (m = SYNC; m < N_MODES; m++) {
        CHECK_REC(r[m]);
        CHECK(!r[m]->starts || strcmp(r[m]->log, WORDS "|end") == 0 ||
              (told_then(r[m], WORDS, "error:ECANCELLED") &&
               !r[m]->skipped) ||
              (strstr(r[m]->log, "|error:ECANCELLED-") && r[m]->skipped));
        if (code == LLMCB_OK) CHECK_STR(r[m]->log, WORDS "|end");
        /* all or none */
        CHECK(!r[m]->finishes || !r[INLINE]->finishes ||
              !strstr(r[m]->log, "end") == !strstr(r[INLINE]->log, "end"));
    }
    llmcb_op_free(op);
    scene_close(&s);
    free_all(r);
    if (test_failures_here)
        printf("  ending %d in turn %d, flags %u\n", (int)how, turn, flags);
    return !over && !test_failures_here;
}

TEST(ended_in_every_turn)
{
    ending_of how;
    int turn;

    for (how = CANCEL; how < N_ENDINGS; how++)
        for (turn = 0; ended_in_turn(how, turn, 0, true);) turn++;
    CHECK(turn > 10); /* or it was not tested */
}

TEST(ended_in_every_turn_of_lock_step)
{
    int turn;

    for (turn = 0; ended_in_turn(CANCEL, turn, LLMCB_AWAIT_EACH, true);)
        turn++;
    CHECK(turn > 10);
    for (turn = 0; ended_in_turn(FREE_LOOP, turn, LLMCB_AWAIT_EACH, true);)
        turn++;
}

/* Workers are wherever they happen to be. */
TEST(ended_at_any_time)
{
    ending_of how;
    int turn;

    for (how = CANCEL; how < N_ENDINGS; how++)
        for (turn = 0; turn < 40; turn++)
            ended_in_turn(how, turn, turn % 2 ? LLMCB_PARALLEL : 0, false);
}

/* An act that ends its own call in its n-th event. */
typedef struct own_end {
    scene *s;
    llmcb_op *op;
    unsigned at;
    ending_of how;
} own_end;

static int act_end(rec *r, const llmcb_event *ev)
{
    own_end *o = (own_end *)r->user;

    (void)ev;
    if (r->done + 1 != o->at) return 0;
    if (o->how == FREE_LOOP)
        CHECK_INT(llmcb_loop_free(o->s->loop), LLMCB_ESTATE);
    else if (o->how == CANCEL_TWICE) /* the next turn is not ours to make */
        llmcb_op_cancel(o->op), llmcb_op_cancel(o->op);
    else
        scene_end_op(o->s, &o->op, o->how);
    return 0;
}

/* Cancel in every event, from every kind of handler, with another of every
 * kind beside it. */
TEST(cancelled_in_every_event)
{
    enum { EVENTS = 7 }; /* start, retry, a, b, c, "" and end */
    unsigned at;
    mode m, k;

    for (m = SYNC; m < N_MODES; m++)
        for (at = 1; at <= EVENTS; at++) {
            scene s;
            rec *r[N_MODES], *x = rec_new("X", m);
            own_end o;

            scene_init(&s);
            scene_tape(&s, RETRY_HEAD, "", 0, LLMCB_REPLAY_KEEP);
            scene_tape(&s, OK_HEAD, "a|b|c" DONE, 3, LLMCB_REPLAY_KEEP);
            all_modes(&s, r, 0);
            scene_add(&s, x);
            x->act = act_end;
            x->user = &o;
            o.s = &s;
            o.at = at;
            o.how = at % 2 ? CANCEL : CANCEL_TWICE;
            scene_open(&s);
            o.op = scene_call(&s);
            CHECK_INT(llmcb_op_wait(o.op), LLMCB_ECANCELLED);
            CHECK_REC(x);
            if (at == EVENTS) { /* case_066: handlers complete */
                CHECK_STR(x->log, WORDS "|end");
                CHECK(llmcb_op_result(o.op)->complete);
            } else {
                CHECK_INT(x->done, at + 1);
                CHECK(strstr(x->log, "|error:ECANCELLED") != NULL);
                CHECK(!llmcb_op_result(o.op)->complete);
            }
            for (k = SYNC; k < N_MODES; k++) {
                CHECK_REC(r[k]);
                if (at == EVENTS) CHECK_STR(r[k]->log, x->log);
                else CHECK(!strstr(r[k]->log, "end"));
            }
            llmcb_op_free(o.op);
            scene_close(&s);
            free_all(r);
            free(x);
            if (test_failures_here) {
                printf("  %s in event %u\n", mode_names[m], at);
                return;
            }
        }
}

/* By another thread while the loop sleeps: it wakes up. */
typedef struct late_cancel {
    llmcb_op *op;
    gate *g;
} late_cancel;

static void *cancel_behind_gate(void *arg)
{
    late_cancel *l = (late_cancel *)arg;

    gate_wait(l->g, 1);
    llmcb_op_cancel(l->op);
    gate_let(l->g, ALL);
    return NULL;
}

TEST(cancelled_by_a_thread_while_the_loop_sleeps)
{
    int real;

    for (real = 0; real < 2; real++) {
        gate g = GATE;
        scene s;
        rec *r = rec_new("S", SYNC), *a = rec_new("A", ASYNC);
        late_cancel l;
        pthread_t thread;

        scene_init(&s);
        s.ld.virtual_clock = !real;
        scene_tape(&s, OK_HEAD, "a|b|c", 0, LLMCB_REPLAY_KEEP);
        s.cd.idle_ms = LLMCB_FOREVER;
        scene_add(&s, r);
        scene_add(&s, a);
        r->gate = &g;
        r->gate_kind = LLMCB_LLM_NEW_TOKEN;
        scene_open(&s);
        l.op = scene_call(&s);
        l.g = &g;
        CHECK_INT(pthread_create(&thread, NULL, cancel_behind_gate, &l), 0);
        CHECK_INT(llmcb_op_wait(l.op), LLMCB_ECANCELLED);
        pthread_join(thread, NULL);
        CHECK_STR(a->log, "start|a|b|c|error:ECANCELLED");
        CHECK_REC(r);
        CHECK_REC(a);
        llmcb_op_free(l.op);
        scene_close(&s);
        free(r);
        free(a);
    }
}

/* A worker that speaks when its call is gone is not heard, and nothing comes
 * of it: its run is there until it has come back. */
static int act_speak(rec *r, const llmcb_event *ev)
{
    llmcb_code code = LLMCB_OK;

    (void)r;
    if (ev->kind == LLMCB_LLM_NEW_TOKEN)
        code = llmcb_run_text(ev->run, str("late"));
    CHECK(code == LLMCB_OK || code == LLMCB_ESTATE);
    return 0;
}

TEST(a_worker_speaks_after_the_end)
{
    ending_of how;

    for (how = CANCEL; how < N_ENDINGS; how++) {
        gate g = GATE;
        scene s;
        rec *r = rec_new("S", SYNC), *i = rec_new("I", INLINE);
        llmcb_op *op;

        scene_init(&s);
        scene_tape(&s, OK_HEAD, "a|b|c", 0, LLMCB_REPLAY_KEEP);
        scene_add(&s, r);
        scene_add(&s, i);
        r->act = act_speak;
        r->gate = &g;
        r->gate_kind = LLMCB_LLM_NEW_TOKEN;
        scene_open(&s);
        op = scene_call(&s);
        turn_to_gate(&s, &g, 1);
        turns(&s, 5);
        if (how == FREE_LOOP) gate_let(&g, ALL);
        scene_end_op(&s, &op, how);
        if (how == FREE_CHAT) llmcb_op_cancel(op);
        if (s.loop) {
            turns(&s, 5);
            gate_let(&g, ALL);
            turn_to_end(&s);
        }
        CHECK_REC(r);
        CHECK_REC(i);
        if (how != FREE_LOOP) {
            CHECK_STR(i->log, "start|a|b|c|error:ECANCELLED");
            CHECK(!strstr(r->log, "late"));
        }
        llmcb_op_free(op);
        scene_close(&s);
        free(r);
        free(i);
    }
}

/* Free is legal inside every callback of the loop's thread, for the op, the
 * chat and both; the loop itself says no. */
TEST(freed_in_every_event)
{
    static const mode modes[] = { ASYNC, INLINE };
    static const ending_of hows[] = { FREE_OP, CANCEL_AND_FREE_OP, FREE_CHAT,
                                      FREE_CHAT_AND_OP, FREE_LOOP };
    enum { EVENTS = 7 };
    unsigned at, i, k;
    mode m;

    for (i = 0; i < 2; i++)
        for (k = 0; k < sizeof hows / sizeof *hows; k++)
            for (at = 1; at <= EVENTS; at++) {
                scene s;
                rec *r[N_MODES], *x = rec_new("X", modes[i]);
                own_end o;
                bool gone = hows[k] != FREE_CHAT && hows[k] != FREE_LOOP;

                scene_init(&s);
                scene_tape(&s, RETRY_HEAD, "", 0, LLMCB_REPLAY_KEEP);
                scene_tape(&s, OK_HEAD, "a|b|c" DONE, 3, LLMCB_REPLAY_KEEP);
                all_modes(&s, r, 0);
                scene_add(&s, x);
                x->act = act_end;
                x->user = &o;
                o.s = &s;
                o.at = at;
                o.how = hows[k];
                scene_open(&s);
                o.op = scene_call(&s);
                turn_to_end(&s);
                CHECK(!o.op == gone);
                if (!gone) CHECK_INT(llmcb_op_code(o.op), LLMCB_OK);
                CHECK_REC(x);
                for (m = SYNC; m < N_MODES; m++) {
                    CHECK_REC(r[m]);
                    if (!gone || at == EVENTS)
                        CHECK_STR(r[m]->log, WORDS "|end");
                    else
                        CHECK(!strstr(r[m]->log, "end"));
                }
                llmcb_op_free(o.op);
                scene_close(&s);
                free_all(r);
                free(x);
                if (test_failures_here) {
                    printf("  %s frees %d in event %u\n",
                           mode_names[modes[i]], (int)hows[k], at);
                    return;
                }
            }
}

/* A callback may free the very op that the program waits for, by whatever
 * function: it is in use, and so is destroyed later. */
TEST(freed_while_the_program_waits_for_it)
{
    enum { EVENTS = 7 };
    unsigned at;
    int how;

    for (how = 0; how < 3; how++)
        for (at = 1; at <= EVENTS; at++) {
            scene s;
            rec *x = rec_new("X", at % 2 ? INLINE : ASYNC);
            const llmcb_chunk *chunk;
            llmcb_op *op;
            llmcb_code code = LLMCB_ECANCELLED;
            own_end o;

            scene_init(&s);
            scene_tape(&s, RETRY_HEAD, "", 0, LLMCB_REPLAY_KEEP);
            scene_tape(&s, OK_HEAD, "a|b|c" DONE, 3, LLMCB_REPLAY_KEEP);
            scene_add(&s, x);
            x->act = act_end;
            x->user = &o;
            o.s = &s;
            o.at = at;
            o.how = at % 3 ? FREE_OP : CANCEL_AND_FREE_OP;
            scene_open(&s);
            op = o.op = how ? scene_stream(&s) : scene_call(&s);
            if (how == 0)
                code = llmcb_op_wait(op);
            else if (how == 1)
                code = llmcb_loop_run_until(s.loop, op);
            else
                while (o.op && llmcb_op_next(o.op, &chunk)) continue;
            CHECK(!o.op);
            CHECK(code == LLMCB_ECANCELLED ||
                  (at == EVENTS && code == LLMCB_OK));
            turn_to_end(&s);
            CHECK_REC(x);
            scene_close(&s);
            free(x);
        }
}

/* What the error event says of who ended it. */
static int act_keep_error(rec *r, const llmcb_event *ev)
{
    llmcb_error *e = (llmcb_error *)r->user;

    if (!ev->error) return 0;
    *e = *ev->error;
    CHECK(!ev->result->complete);
    if (ev->result->n_generations)
        CHECK_STR(ev->result->generations[0].text.ptr, "ab");
    return 0;
}

TEST(case_063_to_065_the_error_event_tells_who_cancelled)
{
    static const ending_of hows[] = { CANCEL, FREE_OP, FREE_LOOP };
    static const llmcb_detail details[] = { LLMCB_DETAIL_CALLER,
                                            LLMCB_DETAIL_CONSUMER,
                                            LLMCB_DETAIL_LOOP };
    size_t k, stream;

    for (k = 0; k < 3; k++)
        for (stream = 0; stream < 2; stream++) {
            scene s;
            rec *r = rec_new("A", ASYNC);
            const llmcb_chunk *chunk;
            llmcb_error e;
            llmcb_op *op;

            memset(&e, 0, sizeof e);
            scene_init(&s);
            scene_tape(&s, OK_HEAD, "a|b|c" DONE, 50, LLMCB_REPLAY_KEEP);
            scene_add(&s, r);
            r->act = act_keep_error;
            r->user = &e;
            scene_open(&s);
            op = stream ? scene_stream(&s) : scene_call(&s);
            if (stream) {
                CHECK(llmcb_op_next(op, &chunk));
                CHECK(llmcb_op_next(op, &chunk));
            } else {
                while (!noted("A>b")) turns(&s, 1);
            }
            scene_end_op(&s, &op, hows[k]);
            if (op) CHECK_INT(llmcb_op_wait(op), LLMCB_ECANCELLED);
            else if (s.loop) turn_to_end(&s);
            CHECK_STR(r->log, "start|a|b|error:ECANCELLED");
            CHECK_INT(e.code, LLMCB_ECANCELLED);
            CHECK_INT(e.detail, details[k]);
            CHECK_REC(r);
            llmcb_op_free(op);
            scene_close(&s);
            free(r);
        }
}

/* A failing server tells every handler once; what came before is told. */
TEST(case_060_to_062_069_errors_of_the_server)
{
    static const char *const pieces[] = {
        "", "a|b", "a|b", "a|b|{\"error\":{\"message\":\"no\"}}", "[DONE]"
    };
    static const llmcb_replay_end ends[] = {
        LLMCB_REPLAY_KEEP, LLMCB_REPLAY_CLOSE, LLMCB_REPLAY_RESET,
        LLMCB_REPLAY_KEEP, LLMCB_REPLAY_KEEP
    };
    static const char *const logs[] = {
        "start|error:EHTTP", "start|a|b|error:ETRUNCATED",
        "start|a|b|error:EIO", "start|a|b|error:EAPI",
        "start|error:ETRUNCATED"
    };
    static const llmcb_code codes[] = { LLMCB_EHTTP, LLMCB_ETRUNCATED,
                                        LLMCB_EIO, LLMCB_EAPI,
                                        LLMCB_ETRUNCATED };
    size_t k, gap;
    mode m;

    for (k = 0; k < 5; k++)
        for (gap = 0; gap < 10; gap += 5) {
            scene s;
            rec *r[N_MODES];
            llmcb_error e;
            llmcb_op *op;

            memset(&e, 0, sizeof e);
            scene_init(&s);
            scene_tape(&s, k ? OK_HEAD : BAD_HEAD, pieces[k], (int64_t)gap,
                       ends[k]);
            all_modes(&s, r, 0);
            r[ASYNC]->act = act_keep_error;
            r[ASYNC]->user = &e;
            r[ASYNC]->ms = 20;
            scene_open(&s);
            op = scene_call(&s);
            CHECK_INT(llmcb_op_wait(op), codes[k]);
            for (m = SYNC; m < N_MODES; m++) {
                CHECK_STR(r[m]->log, logs[k]);
                CHECK_REC(r[m]);
            }
            CHECK_INT(e.code, codes[k]);
            if (!k) {
                CHECK_INT(e.http_status, 400);
                CHECK_STR(e.request_id, "req-7");
            } else if (k < 4) {
                CHECK_STR(llmcb_op_result(op)->generations[0].text.ptr, "ab");
            }
            CHECK(!llmcb_op_result(op)->complete);
            llmcb_op_free(op);
            scene_close(&s);
            free_all(r);
        }
}

/* A handler's failure: one line in the log, and the call goes on. */
static void keep_line(void *user, const char *line)
{
    strcat(strcat((char *)user, line), "\n");
}

/* What a failing handler returns: coroutines return our codes. */
#define FAILED ((int)LLMCB_EJSON)

static int act_fail_at(rec *r, const llmcb_event *ev)
{
    (void)ev;
    return r->done + 1 == *(unsigned *)r->user ? FAILED : 0;
}

static const char *const event_names[] = {
    "on_chat_model_start", "on_retry", "on_llm_new_token", "on_llm_new_token",
    "on_llm_new_token", "on_llm_new_token", "on_llm_end"
};

TEST(case_007_a_failure_is_logged_and_no_more)
{
    unsigned at;
    mode m;

    for (m = SYNC; m < N_MODES; m++)
        for (at = 1; at <= 7; at++) {
            scene s;
            rec *x = rec_new(mode_names[m], m), *b = rec_new("B", ASYNC);
            llmcb_op *op;
            char lines[512] = "", want[128];

            scene_init(&s);
            s.ld.log = keep_line;
            s.ld.log_user = lines;
            scene_tape(&s, RETRY_HEAD, "", 0, LLMCB_REPLAY_KEEP);
            scene_tape(&s, OK_HEAD, "a|b|c" DONE, 0, LLMCB_REPLAY_KEEP);
            scene_add(&s, x);
            scene_add(&s, b);
            x->act = act_fail_at;
            x->user = &at;
            scene_open(&s);
            op = scene_call(&s);
            CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
            sprintf(want, "handler %s failed in %s with %d\n", x->name,
                    event_names[at - 1], FAILED);
            CHECK_STR(lines, want);
            CHECK_STR(x->log, WORDS "|end");
            CHECK_STR(b->log, WORDS "|end");
            llmcb_op_free(op);
            scene_close(&s);
            free(x);
            free(b);
        }
}

/* LLMCB_RAISE in every event of every mode, in lock step and without: the
 * others finish what they have, all who saw the start get one error event
 * with the first failure, and nothing follows. */
TEST(raised_in_every_event)
{
    unsigned at, lock;
    mode m, k;

    for (lock = 0; lock <= LLMCB_AWAIT_EACH; lock += LLMCB_AWAIT_EACH)
        for (m = SYNC; m < N_MODES; m++)
            for (at = 1; at <= 7; at++) {
                scene s;
                rec *r[N_MODES], *x = rec_new("X", m);
                llmcb_op *op;

                scene_init(&s);
                scene_tape(&s, RETRY_HEAD, "", 0, LLMCB_REPLAY_KEEP);
                scene_tape(&s, OK_HEAD, "a|b|c" DONE, 3, LLMCB_REPLAY_KEEP);
                scene_add(&s, x);
                all_modes(&s, r, lock);
                r[ASYNC]->ms = 8;
                x->h.flags |= LLMCB_RAISE | lock;
                x->act = act_fail_at;
                x->user = &at;
                scene_open(&s);
                op = scene_call(&s);
                CHECK_INT(llmcb_op_wait(op), LLMCB_EHANDLER);
                CHECK_INT(llmcb_op_error(op)->handler_result, FAILED);
                CHECK(strstr(llmcb_op_error(op)->message, "X") != NULL);
                CHECK_REC(x);
                CHECK_INT(x->done, at < 7 ? at + 1 : 7);
                for (k = SYNC; k < N_MODES; k++) {
                    CHECK_REC(r[k]);
                    if (at == 7)
                        CHECK_STR(r[k]->log, WORDS "|end");
                    else if (r[k]->starts)
                        CHECK(told_then(r[k], WORDS, "error:EHANDLER"));
                    CHECK_INT(r[k]->skipped, 0);
                }
                if (at == 1) CHECK_INT(s.spy.requests, 0);
                if (at == 2) CHECK_INT(s.spy.requests, 1);
                /* case_072: the request is closed */
                if (at == 3 || at == 4) CHECK(noted("dropped"));
                CHECK_INT(llmcb_op_result(op)->complete, at == 7);
                llmcb_op_free(op);
                scene_close(&s);
                free_all(r);
                free(x);
                if (test_failures_here) {
                    printf("  %s raises in event %u, lock step %u\n",
                           mode_names[m], at, lock);
                    return;
                }
            }
}

/* Two that fail in one event: the first in the list is told of. */
TEST(the_first_of_two_failures_is_kept)
{
    int order;

    for (order = 0; order < 2; order++) {
        scene s;
        rec *x = rec_new("X", order ? ASYNC : INLINE);
        rec *y = rec_new("Y", order ? INLINE : ASYNC);
        rec *z = rec_new("Z", SYNC);
        unsigned at = 2;
        llmcb_error e;
        llmcb_op *op;

        memset(&e, 0, sizeof e);
        scene_init(&s);
        scene_tape(&s, OK_HEAD, "ab|c" DONE, 0, LLMCB_REPLAY_KEEP);
        scene_add(&s, x);
        scene_add(&s, y);
        scene_add(&s, z);
        x->h.flags |= LLMCB_RAISE;
        y->h.flags |= LLMCB_RAISE;
        x->act = y->act = act_fail_at;
        x->user = y->user = &at;
        scene_open(&s);
        op = scene_call(&s);
        CHECK_INT(llmcb_op_wait(op), LLMCB_EHANDLER);
        /* inline comes first, wherever it stands */
        CHECK(strstr(llmcb_op_error(op)->message, order ? ": Y" : ": X") !=
              NULL);
        CHECK_STR(x->log, "start|ab|error:EHANDLER");
        CHECK_STR(y->log, "start|ab|error:EHANDLER");
        CHECK_REC(x);
        CHECK_REC(y);
        CHECK_REC(z);
        llmcb_op_free(op);
        scene_close(&s);
        free(x);
        free(y);
        free(z);
    }
}

/* In events of the program it is the same, and so it is in a batch: the
 * other runs have their own life. */
static int act_fail_text(rec *r, const llmcb_event *ev)
{
    (void)r;
    return ev->kind == LLMCB_TEXT ? FAILED : 0;
}

TEST(raised_in_a_text_event)
{
    mode m;

    for (m = SYNC; m < N_MODES; m++) {
        scene s;
        rec *x = rec_new("X", m), *b = rec_new("B", ASYNC);
        llmcb_op *op;

        scene_init(&s);
        scene_tape(&s, OK_HEAD, "a|b" DONE, 10, LLMCB_REPLAY_KEEP);
        scene_add(&s, x);
        scene_add(&s, b);
        x->h.flags |= LLMCB_RAISE;
        x->act = act_fail_text;
        scene_open(&s);
        op = scene_call(&s);
        CHECK_INT(llmcb_run_text(llmcb_op_run_at(op, 0), str("t")),
                  LLMCB_OK);
        CHECK_INT(llmcb_op_wait(op), LLMCB_EHANDLER);
        CHECK_STR(x->log, "start|text:t|error:EHANDLER");
        CHECK_STR(b->log, "start|text:t|error:EHANDLER");
        CHECK_INT(s.spy.requests, 0);
        CHECK_REC(x);
        CHECK_REC(b);
        llmcb_op_free(op);
        scene_close(&s);
        free(x);
        free(b);
    }
}

TEST(raised_in_one_prompt_of_a_batch)
{
    unsigned at;
    mode m;

    for (m = SYNC; m < N_MODES; m++)
        for (at = 1; at <= 8; at++) {
            scene s;
            rec *x = rec_new("X", m), *b = rec_new("B", ASYNC);
            llmcb_op *op;

            scene_init(&s);
            scene_tape(&s, OK_HEAD, "a|b" DONE, 10, LLMCB_REPLAY_KEEP);
            scene_add(&s, x);
            scene_add(&s, b);
            x->h.flags |= LLMCB_RAISE;
            x->act = act_fail_at;
            x->user = &at;
            scene_open(&s);
            op = call_batch(&s, 3, NULL);
            CHECK_INT(llmcb_op_wait(op), LLMCB_EHANDLER);
            if (at <= 3) CHECK(s.spy.requests < 3);
            CHECK_INT(b->starts, 3);
            CHECK_REC(x);
            CHECK_REC(b);
            llmcb_op_free(op);
            scene_close(&s);
            free(x);
            free(b);
        }
}

/* The slow sibling has its event before the error event. */
TEST(case_010_siblings_finish_before_the_error)
{
    scene s;
    rec *bad = rec_new("bad", ASYNC), *slow = rec_new("slow", ASYNC);
    unsigned at = 2;
    llmcb_op *op;

    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a|b" DONE, 0, LLMCB_REPLAY_KEEP);
    scene_add(&s, bad);
    scene_add(&s, slow);
    bad->h.flags |= LLMCB_RAISE;
    bad->act = act_fail_at;
    bad->user = &at;
    slow->ms = 50;
    scene_open(&s);
    op = scene_call(&s);
    CHECK_INT(llmcb_op_wait(op), LLMCB_EHANDLER);
    CHECK(before("slow>a", "bad<error"));
    CHECK(before("slow>a", "slow<error"));
    CHECK_STR(bad->log, "start|a|error:EHANDLER");
    CHECK_REC(bad);
    CHECK_REC(slow);
    llmcb_op_free(op);
    scene_close(&s);
    free(bad);
    free(slow);
}

/* In lock step who comes later in the list does not get the event. */
TEST(case_012_an_inline_failure_stops_the_event)
{
    unsigned at;

    for (at = 1; at <= 2; at++) {
        scene s;
        rec *n1 = rec_new("N1", ASYNC), *i1 = rec_new("I1", INLINE);
        rec *i2 = rec_new("I2", INLINE), *n2 = rec_new("N2", SYNC);
        rec *all[4];
        llmcb_op *op;
        int i;

        all[0] = n1;
        all[1] = i1;
        all[2] = i2;
        all[3] = n2;
        scene_init(&s);
        scene_tape(&s, OK_HEAD, "a|b" DONE, 0, LLMCB_REPLAY_KEEP);
        for (i = 0; i < 4; i++) {
            all[i]->h.flags |= LLMCB_AWAIT_EACH;
            scene_add(&s, all[i]);
        }
        i1->h.flags |= LLMCB_RAISE;
        i1->act = act_fail_at;
        i1->user = &at;
        scene_open(&s);
        op = scene_call(&s);
        CHECK_INT(llmcb_op_wait(op), LLMCB_EHANDLER);
        CHECK_STR(i1->log, at == 1 ? "start|error:EHANDLER"
                                   : "start|a|error:EHANDLER");
        for (i = 0; i < 4; i++) {
            CHECK_REC(all[i]);
            /* without the start there is no finish */
            if (all[i] != i1)
                CHECK_STR(all[i]->log, at == 1 ? "" : "start|error:EHANDLER");
        }
        llmcb_op_free(op);
        scene_close(&s);
        for (i = 0; i < 4; i++) free(all[i]);
    }
}

/* The first failure is kept; that a handler failed on top of it is said. */
TEST(case_073_a_failure_in_the_error_event_is_attached)
{
    mode m;

    for (m = SYNC; m < N_MODES; m++) {
        scene s;
        rec *x = rec_new("X", m), *b = rec_new("B", ASYNC);
        unsigned at = 2;
        llmcb_op *op;

        scene_init(&s);
        scene_tape(&s, BAD_HEAD, "", 0, LLMCB_REPLAY_KEEP);
        scene_add(&s, x);
        scene_add(&s, b);
        x->h.flags |= LLMCB_RAISE;
        x->act = act_fail_at;
        x->user = &at;
        scene_open(&s);
        op = scene_call(&s);
        CHECK_INT(llmcb_op_wait(op), LLMCB_EHTTP);
        CHECK_INT(llmcb_op_error(op)->http_status, 400);
        CHECK_INT(llmcb_op_error(op)->handler_result, FAILED);
        CHECK_STR(x->log, "start|error:EHTTP");
        CHECK_STR(b->log, "start|error:EHTTP");
        CHECK_REC(x);
        CHECK_REC(b);
        llmcb_op_free(op);
        scene_close(&s);
        free(x);
        free(b);
    }
}

/* ... also when the outcome was known, but not told, as the handler failed. */
TEST(a_failure_behind_a_known_error_is_attached)
{
    scene s;
    rec *x = rec_new("X", ASYNC);
    unsigned at = 3;
    llmcb_op *op;

    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a|b", 0, LLMCB_REPLAY_RESET);
    scene_add(&s, x);
    x->ms = 50; /* the connection has broken when it fails */
    x->h.flags |= LLMCB_RAISE;
    x->act = act_fail_at;
    x->user = &at;
    scene_open(&s);
    op = scene_call(&s);
    CHECK_INT(llmcb_op_wait(op), LLMCB_EIO);
    CHECK_INT(llmcb_op_error(op)->handler_result, FAILED);
    CHECK_STR(x->log, "start|a|b|error:EIO");
    CHECK_REC(x);
    llmcb_op_free(op);
    scene_close(&s);
    free(x);
}

/* A finish that needs a barrier, an await and a worker when the loop goes:
 * all are told, and why. */
TEST(loop_free_tells_everybody)
{
    scene s;
    rec *r[N_MODES];
    llmcb_error e;
    int i;
    mode m;

    memset(&e, 0, sizeof e);
    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a|b", 0, LLMCB_REPLAY_KEEP);
    all_modes(&s, r, 0);
    r[SYNC_TOKENS]->ms = 1000000;
    r[INLINE]->act = act_keep_error;
    r[INLINE]->user = &e;
    scene_open(&s);
    for (i = 0; i < 3; i++) scene_call(&s);
    scene_stream(&s);
    turns(&s, 4);
    scene_close(&s);
    CHECK_INT(e.detail, LLMCB_DETAIL_LOOP);
    for (m = SYNC; m < N_MODES; m++) CHECK_REC(r[m]);
    CHECK_INT(r[INLINE]->finishes, 4);
    CHECK_INT(r[SYNC_TOKENS]->finishes, r[SYNC_TOKENS]->starts);
    free_all(r);
}

/* ======== 7: no allocation a token ======================================== */

/* Notes the heap's calls at two events far apart. */
typedef struct meter {
    scene *s;
    unsigned from, to;
    long at_from, at_to;
} meter;

static int act_meter(rec *r, const llmcb_event *ev)
{
    meter *x = (meter *)r->user;
    unsigned n = r->done + 1;

    (void)ev;
    if (n != x->from && n != x->to) return 0;
    pthread_mutex_lock(&x->s->heap.m);
    *(n == x->from ? &x->at_from : &x->at_to) = x->s->heap.calls;
    pthread_mutex_unlock(&x->s->heap.m);
    return 0;
}

/* A quiet recorder, so that its log does not matter. */
TEST(no_allocation_a_token)
{
    enum { TOKENS = 6000 };
    char *pieces = (char *)malloc(TOKENS * 2 + 64), *at;
    int mine;
    size_t i, empty;

    REQUIRE(pieces != NULL);
    for (mine = -1; mine < N_MODES; mine++)
        for (empty = 0; empty < 2; empty++) {
            scene s;
            rec *r = rec_new("M", mine < 0 ? INLINE : (mode)mine);
            meter x;
            llmcb_op *op;
            long calls, blocks;

            at = pieces;
            for (i = 0; i < TOKENS; i++)
                at += sprintf(at, empty ? "|" : "x|");
            strcpy(at, "$|[DONE]");
            scene_init(&s);
            scene_tape(&s, OK_HEAD, pieces, 0, LLMCB_REPLAY_KEEP);
            x.s = &s;
            x.from = 2000;
            x.to = 6000;
            x.at_from = x.at_to = 0;
            r->act = act_meter;
            r->user = &x;
            scene_add(&s, r);
            scene_open(&s);
            op = scene_call(&s);
            CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
            CHECK_INT(r->events, TOKENS + 3);
            CHECK(x.at_from > 0 && x.at_to > 0);
            calls = x.at_to - x.at_from;
            /* under ASan blocks are not used again: one for 10 records */
            blocks = LLMCBI_SPARE ? 0 : 4000 / 10;
            /* "x" 6000 times: doubled at 2048 and 4096; a pause takes two,
             * which hold what waits */
            CHECK(calls <= blocks + (empty ? 2 : 4));
            if (test_failures_here) {
                printf("  %ld calls for 4000 tokens of %s\n", calls,
                       mode_names[r->h.flags ? INLINE : mine]);
                mine = N_MODES;
            }
            llmcb_op_free(op);
            scene_close(&s);
            free(r);
        }
    free(pieces);
}

/* ======== the start event ================================================= */

static int act_check_start(rec *r, const llmcb_event *ev)
{
    if (!ev->start) return 0;
    CHECK_STR(ev->start->prompt.ptr, (const char *)r->user);
    CHECK_INT(ev->start->prompt.len, strlen((const char *)r->user));
    CHECK_INT(ev->start->batch_size, 1);
    CHECK_STR(ev->start->model, "gpt-4o-mini");
    CHECK(strstr(ev->start->params.ptr, "\"stream\":true") != NULL);
    CHECK(!strstr(ev->start->params.ptr, "\"messages\""));
    CHECK_STR(ev->run->name, "ChatOpenAI");
    CHECK_STR(ev->run->parent_id, "");
    return 0;
}

/* Without a chat start function a handler is told the llm start instead, with
 * the prompt as LangChain writes it: row 2, and all roles. */
TEST(case_002_003_fallback_to_llm_start)
{
    static const char want[] = "System: You are X\nSystem: dev\nHuman: hi\n"
                               "AI: \nTool: 42\nHuman: a\nb";
    mode m;

    for (m = SYNC; m < N_MODES; m++) {
        bool is_async = m == ASYNC || m == SYNC_TOKENS || m == INLINE_TOKENS;
        scene s;
        rec *x = rec_new("X", m), *both = rec_new("B", m);
        llmcb_message ms[6];
        llmcb_tool_call call;
        llmcb_op *op;
        char log[256];

        memset(ms, 0, sizeof ms);
        memset(&call, 0, sizeof call);
        call.id = str("id");
        call.name = str("f");
        call.arguments = str("{}");
        ms[0].role = LLMCB_SYSTEM;
        ms[0].content = "You are X";
        ms[1].role = LLMCB_DEVELOPER;
        ms[1].content = "dev";
        ms[2].content = "hi there";
        ms[2].content_len = 2;
        ms[3].role = LLMCB_ASSISTANT;
        ms[3].tool_calls = &call;
        ms[3].n_tool_calls = 1;
        ms[4].role = LLMCB_TOOL;
        ms[4].content = "42";
        ms[4].tool_call_id = "id";
        ms[5].content = "a\nb";
        scene_init(&s);
        scene_tape(&s, OK_HEAD, "a" DONE, 0, LLMCB_REPLAY_KEEP);
        scene_add(&s, x);
        scene_add(&s, both);
        if (is_async) {
            x->h.async.on_chat_model_start = NULL;
            x->h.async.on_llm_start = both->h.async.on_llm_start = rec_async;
        } else {
            x->h.sync.on_chat_model_start = NULL;
            x->h.sync.on_llm_start = both->h.sync.on_llm_start = rec_sync;
        }
        x->act = both->act = act_check_start;
        x->user = both->user = (void *)(size_t)want;
        scene_open(&s);
        op = llmcb_chat_generate(s.chat, ms, 6, NULL);
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        sprintf(log, "llm(%s)|a||end", want);
        CHECK_STR(x->log, log);
        CHECK_STR(both->log, "start|a||end");
        CHECK_REC(x);
        CHECK_REC(both);
        llmcb_op_free(op);
        scene_close(&s);
        free(x);
        free(both);
    }
}

/* The messages of the start are the caller's, copied. */
static int act_messages(rec *r, const llmcb_event *ev)
{
    const llmcb_message *m;

    (void)r;
    if (!ev->start) return 0;
    CHECK_INT(ev->start->n_messages, 2);
    m = ev->start->messages;
    CHECK_INT(m[0].role, LLMCB_ASSISTANT);
    CHECK_STR(m[0].content, "");
    CHECK_INT(m[0].content_len, 0);
    CHECK_INT(m[0].n_tool_calls, 1);
    CHECK_STR(m[0].tool_calls[0].id.ptr, "id");
    CHECK_STR(m[0].tool_calls[0].name.ptr, "f");
    CHECK_STR(m[0].tool_calls[0].arguments.ptr, "{\"a\":1}");
    CHECK_INT(m[1].role, LLMCB_USER);
    CHECK_INT(m[1].content_len, 3);
    CHECK(memcmp(m[1].content, "x\0y", 4) == 0);
    CHECK_STR(m[1].name, "joe");
    CHECK_STR(m[1].parts, "[1]");
    return 0;
}

TEST(start_shows_copies_of_the_messages)
{
    mode m;

    for (m = SYNC; m <= INLINE; m++) {
        scene s;
        rec *r = rec_new(mode_names[m], m);
        llmcb_message ms[2];
        llmcb_tool_call call;
        char id[] = "id", name[] = "f", args[] = "{\"a\":1}";
        char text[] = "x\0y", joe[] = "joe", parts[] = "[1]";
        llmcb_op *op;

        memset(ms, 0, sizeof ms);
        memset(&call, 0, sizeof call);
        call.id = str(id);
        call.name = str(name);
        call.arguments = str(args);
        ms[0].role = LLMCB_ASSISTANT;
        ms[0].tool_calls = &call;
        ms[0].n_tool_calls = 1;
        ms[1].content = text;
        ms[1].content_len = 3;
        ms[1].name = joe;
        ms[1].parts = parts;
        scene_init(&s);
        scene_tape(&s, OK_HEAD, "a" DONE, 0, LLMCB_REPLAY_KEEP);
        scene_add(&s, r);
        r->act = act_messages;
        r->ms = 5;
        scene_open(&s);
        op = llmcb_chat_generate(s.chat, ms, 2, NULL);
        memset(ms, 0xEE, sizeof ms);
        memset(&call, 0xEE, sizeof call);
        memset(id, 'z', 2);
        memset(name, 'z', 1);
        memset(args, 'z', 7);
        memset(text, 'z', 3);
        memset(joe, 'z', 3);
        memset(parts, 'z', 3);
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        CHECK_STR(r->log, "start|a||end");
        llmcb_op_free(op);
        scene_close(&s);
        free(r);
    }
}

/* One mask a handler; a skipped event is as one without a function. */
TEST(case_004_005_skip_masks)
{
    static const unsigned masks[] = { LLMCB_SKIP_LLM, LLMCB_SKIP_RETRY,
                                      LLMCB_SKIP_CUSTOM,
                                      LLMCB_SKIP_CHAIN | LLMCB_SKIP_AGENT |
                                          LLMCB_SKIP_RETRIEVER };
    static const char *const logs[] = {
        "retry:1|text:t|custom:n=d", "start|text:t|custom:n=d|a||end",
        "start|retry:1|text:t|a||end",
        "start|retry:1|text:t|custom:n=d|a||end"
    };
    size_t k;
    mode m;

    for (k = 0; k < 4; k++)
        for (m = SYNC; m < N_MODES; m++) {
            scene s;
            rec *r = rec_new(mode_names[m], m), *i = rec_new("W", INLINE);
            llmcb_op *op;

            scene_init(&s);
            scene_tape(&s, RETRY_HEAD, "", 0, LLMCB_REPLAY_KEEP);
            scene_tape(&s, OK_HEAD, "a" DONE, 0, LLMCB_REPLAY_KEEP);
            scene_add(&s, r);
            scene_add(&s, i);
            r->h.skip = masks[k];
            scene_open(&s);
            op = scene_call(&s);
            while (!noted("W>retry:1")) turns(&s, 1);
            CHECK_INT(llmcb_run_text(llmcb_op_run_at(op, 0), str("t")),
                      LLMCB_OK);
            CHECK_INT(llmcb_run_custom(llmcb_op_run_at(op, 0), "n",
                                       str("d")),
                      LLMCB_OK);
            CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
            CHECK_STR(*r->log == '|' ? r->log + 1 : r->log, logs[k]);
            llmcb_op_free(op);
            scene_close(&s);
            free(r);
            free(i);
        }
}

/* A handler that handles nothing, or only some events, is in nobody's way.
 * case_025: nor is having none. */
TEST(case_001_handlers_without_functions)
{
    scene s;
    llmcb_handler nothing, *list[1];
    rec *r = rec_new("E", SYNC);
    llmcb_op *op;

    memset(&nothing, 0, sizeof nothing);
    nothing.flags = LLMCB_AWAIT_EACH | LLMCB_RAISE;
    list[0] = &nothing;
    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a|b" DONE, 0, LLMCB_REPLAY_KEEP);
    scene_open(&s);
    op = scene_call(&s);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_INT(strlen(llmcb_op_run_at(op, 0)->id), 36);
    llmcb_op_free(op);
    s.chat->own.callbacks = list;
    s.chat->own.n_callbacks = 1;
    memset(&r->h.sync, 0, sizeof r->h.sync);
    r->h.sync.on_llm_end = rec_sync;
    op = scene_call_with(&s, r);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_STR(*r->log == '|' ? r->log + 1 : r->log, "end");
    CHECK_STR(llmcb_op_result(op)->generations[0].text.ptr, "ab");
    llmcb_op_free(op);
    scene_close(&s);
    free(r);
}

/* Request, local, constructor: each handler once, in this order. */
TEST(case_027_028_034_handlers_of_call_and_chat)
{
    scene s;
    rec *r = rec_new("R", INLINE), *l = rec_new("L", INLINE);
    rec *c = rec_new("C", INLINE);
    llmcb_handler *request[3], *local[2];
    llmcb_config config;
    llmcb_op *op;

    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a" DONE, 0, LLMCB_REPLAY_KEEP);
    scene_add(&s, c);
    scene_add(&s, r);
    scene_add(&s, c);
    scene_open(&s);
    memset(&config, 0, sizeof config);
    request[0] = &r->h;
    request[1] = &l->h;
    request[2] = &r->h;
    local[0] = &l->h;
    local[1] = &r->h;
    config.callbacks = request;
    config.n_callbacks = 3;
    config.local_callbacks = local;
    config.n_local_callbacks = 2;
    op = call_config(&s, &config);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_STR(r->log, "start|a||end");
    CHECK_STR(l->log, "start|a||end");
    CHECK_STR(c->log, "start|a||end");
    CHECK(before("R>start", "L<start"));
    CHECK(before("L>start", "C<start"));
    CHECK(before("R>end", "L<end"));
    CHECK(before("L>end", "C<end"));
    llmcb_op_free(op);
    scene_close(&s);
    free(r);
    free(l);
    free(c);
}

static void join_tags(char *out, const llmcb_run *run)
{
    size_t i;

    *out = '\0';
    for (i = 0; i < run->n_tags; i++)
        sprintf(out + strlen(out), "%s%s", i ? "," : "", run->tags[i]);
}

static void join_pairs(char *out, const llmcb_run *run)
{
    size_t i;

    *out = '\0';
    for (i = 0; i < run->n_metadata; i++)
        sprintf(out + strlen(out), "%s%s=%s", i ? "," : "",
                run->metadata[i].key, run->metadata[i].value);
}

/* All events show the same labels, and the op's run does after its chat is
 * gone. */
typedef struct labels {
    char tags[256], pairs[512], name[64], id[37], parent[37];
} labels;

static int act_labels(rec *r, const llmcb_event *ev)
{
    labels *l = (labels *)r->user, now;

    memset(&now, 0, sizeof now);
    join_tags(now.tags, ev->run);
    join_pairs(now.pairs, ev->run);
    snprintf(now.name, sizeof now.name, "%s", ev->run->name);
    strcpy(now.id, ev->run->id);
    strcpy(now.parent, ev->run->parent_id);
    if (ev->start) *l = now;
    else CHECK(memcmp(l, &now, sizeof now) == 0);
    return 0;
}

TEST(case_030_032_071_labels_of_a_run)
{
    static const char id[] = "01234567-89ab-4cde-8f01-23456789abcd";
    static const char parent[] = "ABCDEF00-89ab-1cde-8f01-23456789abcd";
    scene s;
    rec *r = rec_new("A", ASYNC);
    const char *request_tags[] = { "a", "dup", "both", "a" };
    const char *local_tags[] = { "both", "l" }, *chat_tags[] = { "c", "dup" };
    llmcb_pair pairs[3], local[2], chat[3];
    char key[] = "k", one[] = "1", tag[] = "dup";
    llmcb_config config;
    llmcb_op *op;
    labels l;

    memset(&config, 0, sizeof config);
    memset(&l, 0, sizeof l);
    request_tags[1] = tag;
    pairs[0].key = key;
    pairs[0].value = one;
    pairs[1].key = "r";
    pairs[1].value = "r1";
    pairs[2].key = "ls_model_type";
    pairs[2].value = "mine";
    local[0].key = "r";
    local[0].value = "l2";
    local[1].key = "l";
    local[1].value = "3";
    chat[0].key = "k";
    chat[0].value = "2";
    chat[1].key = "c";
    chat[1].value = "4";
    chat[2].key = "ls_max_tokens";
    chat[2].value = "x";
    config.tags = request_tags;
    config.n_tags = 4;
    config.local_tags = local_tags;
    config.n_local_tags = 2;
    config.metadata = pairs;
    config.n_metadata = 3;
    config.local_metadata = local;
    config.n_local_metadata = 2;
    config.run_id = id;
    config.parent_id = parent;
    config.run_name = "my run";
    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a" DONE, 10, LLMCB_REPLAY_KEEP);
    scene_add(&s, r);
    r->act = act_labels;
    r->user = &l;
    s.cd.tags = chat_tags;
    s.cd.n_tags = 2;
    s.cd.metadata = chat;
    s.cd.n_metadata = 3;
    s.cd.max_tokens = 25;
    s.cd.model = "m";
    scene_open(&s);
    op = call_config(&s, &config);
    *key = *one = *tag = 'z'; /* copied when the call was made */
    llmcb_chat_free(s.chat);
    s.chat = NULL;
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_STR(r->log, "start|a||end");
    /* what comes again moves to the end; within one list it may repeat */
    CHECK_STR(l.tags, "a,a,both,l,c,dup");
    CHECK_STR(l.pairs, "k=2,r=l2,ls_model_type=chat,l=3,c=4,"
                       "ls_max_tokens=25,ls_provider=openai,ls_model_name=m");
    CHECK_STR(l.name, "my run");
    CHECK_STR(l.id, id);
    CHECK_STR(l.parent, parent);
    CHECK_STR(llmcb_op_run_at(op, 0)->id, id);
    {
        char again[256];
        join_tags(again, llmcb_op_run_at(op, 0));
        CHECK_STR(again, l.tags);
    }
    llmcb_op_free(op);
    scene_close(&s);
    free(r);
}

TEST(case_044_run_ids)
{
    static const char id[] = "01234567-89ab-4cde-8f01-23456789abcd";
    scene s;
    rec *r = rec_new("A", ASYNC);
    llmcb_config config;
    llmcb_op *op;
    size_t i, k;

    memset(&config, 0, sizeof config);
    config.run_id = config.parent_id = id;
    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a" DONE, 0, LLMCB_REPLAY_KEEP);
    scene_add(&s, r);
    scene_open(&s);
    op = call_batch(&s, 3, &config);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_INT(llmcb_op_n_prompts(op), 3);
    CHECK_STR(llmcb_op_run_at(op, 0)->id, id);
    for (i = 0; i < 3; i++) {
        const llmcb_run *run = llmcb_op_run_at(op, i);
        CHECK(llmcbi_uuid_valid(run->id));
        if (i) CHECK(run->id[14] == '4' && strchr("89ab", run->id[19]));
        CHECK_STR(run->parent_id, id);
        for (k = 0; k < i; k++)
            CHECK(strcmp(run->id, llmcb_op_run_at(op, k)->id) != 0);
        CHECK_STR(r->runs[i].id, run->id); /* told in this order */
    }
    CHECK(!llmcb_op_run_at(op, 3));
    llmcb_op_free(op);
    scene_close(&s);
    free(r);
}

/* ======== batches ========================================================= */

#define USAGE(in, out)                                             \
    "{\"choices\":[],\"usage\":{\"prompt_tokens\":" in             \
    ",\"completion_tokens\":" out ",\"total_tokens\":9}}|[DONE]"

TEST(case_056_a_batch_of_two)
{
    scene s;
    rec *r = rec_new("A", ASYNC), *i1 = rec_new("I1", INLINE);
    rec *i2 = rec_new("I2", INLINE);
    llmcb_op *op;
    llmcb_usage u;

    scene_init(&s);
    scene_tape(&s, OK_HEAD, "one|$|" USAGE("1", "2"), 10, LLMCB_REPLAY_KEEP);
    scene_tape(&s, OK_HEAD, "two|$|" USAGE("10", "20"), 5, LLMCB_REPLAY_KEEP);
    scene_add(&s, r);
    scene_add(&s, i1);
    scene_add(&s, i2);
    r->ms = 3;
    scene_open(&s);
    op = call_batch(&s, 2, NULL);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    /* all starts before any request; case_046: prompt by prompt */
    CHECK(before("I1<start I1>start I2<start I2>start", "request"));
    CHECK_INT(count_of(trace, "I1<start I1>start I2<start I2>start"), 2);
    {
        const char *q = strstr(trace, "request"), *at = trace;
        size_t n = 0;
        for (; (at = strstr(at, "A>start")) != NULL; at++) n += at < q;
        CHECK_INT(n, 2);
    }
    CHECK_INT(r->starts, 2);
    CHECK_STR(llmcb_op_result_at(op, 0)->generations[0].text.ptr, "one");
    CHECK_STR(llmcb_op_result_at(op, 1)->generations[0].text.ptr, "two");
    u = llmcb_op_usage(op);
    CHECK(u.known);
    CHECK_INT(u.input_tokens, 11);
    CHECK_INT(u.output_tokens, 22);
    CHECK_INT(u.total_tokens, 18);
    CHECK(strcmp(llmcb_op_run_at(op, 0)->id, llmcb_op_run_at(op, 1)->id));
    CHECK_INT(llmcb_op_error_at(op, 1)->code, LLMCB_OK);
    CHECK_REC(r);
    CHECK_REC(i1);
    CHECK_REC(i2);
    llmcb_op_free(op);
    scene_close(&s);
    free(r);
    free(i1);
    free(i2);
}

/* Which prompt it was, by place in the batch. */
static int act_number(rec *r, const llmcb_event *ev)
{
    if (is_finish(ev->kind))
        note("%s%c", ev->error ? "error" : "end",
             '1' + (int)(rec_run_of(r, ev) - r->runs));
    return 0;
}

/* Errors one by one in index order, then the ends; the code is the first
 * error's, and what succeeded can be read. */
TEST(case_057_058_a_batch_of_which_two_fail)
{
    mode m;

    for (m = SYNC; m < N_MODES; m++) {
        scene s;
        rec *r = rec_new("X", m);
        llmcb_op *op;

        scene_init(&s);
        scene_tape(&s, OK_HEAD, "one" DONE, 1, LLMCB_REPLAY_KEEP);
        scene_tape(&s, BAD_HEAD, "", 0, LLMCB_REPLAY_KEEP);
        scene_tape(&s, OK_HEAD, "three" DONE, 9, LLMCB_REPLAY_KEEP);
        scene_tape(&s, "HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", "", 0,
                   LLMCB_REPLAY_KEEP);
        scene_add(&s, r);
        r->act = act_number;
        r->ms = 20;
        scene_open(&s);
        op = call_batch(&s, 4, NULL);
        CHECK_INT(llmcb_op_wait(op), LLMCB_EHTTP);
        CHECK_INT(llmcb_op_error(op)->http_status, 400);
        CHECK(before("X>three", "error2"));
        CHECK(before("error2", "error4"));
        CHECK(before("X>error:EHTTP", "error4")); /* one by one */
        CHECK(before("error4", "end1"));
        CHECK(before("error4", "X<end"));
        CHECK(before("error4", "end3")); /* the ends in any order */
        CHECK_INT(llmcb_op_error_at(op, 0)->code, LLMCB_OK);
        CHECK_INT(llmcb_op_error_at(op, 1)->http_status, 400);
        CHECK_INT(llmcb_op_error_at(op, 3)->http_status, 404);
        CHECK(llmcb_op_result_at(op, 0)->complete);
        CHECK_STR(llmcb_op_result_at(op, 0)->generations[0].text.ptr, "one");
        CHECK_STR(llmcb_op_result_at(op, 2)->generations[0].text.ptr,
                  "three");
        CHECK(!llmcb_op_result_at(op, 3)->complete);
        CHECK(!llmcb_op_usage(op).known);
        CHECK_REC(r);
        CHECK_INT(r->finishes, 4);
        llmcb_op_free(op);
        scene_close(&s);
        free(r);
    }
}

/* A batch that is cancelled when some have ended: every run that started has
 * one finish. */
TEST(case_059_a_batch_cancelled_under_way)
{
    int turn;
    bool over = false;

    for (turn = 0; !over && !test_failures_here; turn++) {
        scene s;
        rec *r[N_MODES];
        llmcb_config config;
        llmcb_op *op;
        mode m;
        int i;

        memset(&config, 0, sizeof config);
        config.max_concurrency = 2;
        scene_init(&s);
        scene_tape(&s, OK_HEAD, "a" DONE, 2, LLMCB_REPLAY_KEEP);
        scene_tape(&s, BAD_HEAD, "", 0, LLMCB_REPLAY_KEEP);
        scene_tape(&s, OK_HEAD, "b" DONE, 5, LLMCB_REPLAY_KEEP);
        all_modes(&s, r, 0);
        r[ASYNC]->ms = 3;
        scene_open(&s);
        op = call_batch(&s, 4, &config);
        for (i = 0; i < turn && !llmcb_op_done(op); i++) {
            turns(&s, 1);
            pool_rests(&s);
        }
        over = llmcb_op_done(op);
        llmcb_op_cancel(op);
        llmcb_op_wait(op);
        CHECK(llmcb_op_code(op) == LLMCB_ECANCELLED ||
              llmcb_op_code(op) == LLMCB_EHTTP);
        for (m = SYNC; m < N_MODES; m++) {
            CHECK_REC(r[m]);
            CHECK(r[m]->starts <= 4);
        }
        llmcb_op_free(op);
        scene_close(&s);
        free_all(r);
    }
    CHECK(turn > 10);
}

TEST(case_074_max_concurrency)
{
    unsigned most;

    for (most = 1; most <= 20; most += most < 4 ? 1 : 8) {
        scene s;
        rec *r = rec_new("A", ASYNC);
        llmcb_config config;
        llmcb_op *op;
        size_t i;

        memset(&config, 0, sizeof config);
        config.max_concurrency = most;
        scene_init(&s);
        for (i = 0; i < 20; i++) {
            char text[16];
            sprintf(text, "t%d" DONE, (int)i);
            if (i % 7 == 3)
                /* an error that lets go: the scene counts open requests */
                scene_tape(&s, OK_HEAD, "{\"error\":{\"message\":\"no\"}}",
                           2, LLMCB_REPLAY_KEEP);
            else
                scene_tape(&s, OK_HEAD, text, 1 + (int64_t)(i * 5 % 7),
                           LLMCB_REPLAY_KEEP);
        }
        scene_add(&s, r);
        scene_open(&s);
        op = call_batch(&s, 20, &config);
        llmcb_op_wait(op);
        CHECK_INT(s.spy.requests, 20);
        for (i = 0; i < 20; i++) {
            char text[16];
            sprintf(text, "t%d", (int)i);
            CHECK_INT(llmcb_op_error_at(op, i)->code,
                      i % 7 == 3 ? LLMCB_EAPI : LLMCB_OK);
            if (i % 7 != 3)
                CHECK_STR(llmcb_op_result_at(op, i)->generations[0].text.ptr,
                          text);
        }
        CHECK_INT(s.spy.peak, most);
        CHECK_REC(r);
        llmcb_op_free(op);
        scene_close(&s);
        free(r);
    }
}

/* ======== events of the program =========================================== */

/* An act that says something in each event, and what it must be told. */
typedef struct talker {
    unsigned said;
    llmcb_code in_finish;
    bool custom;
} talker;

static int act_talk(rec *r, const llmcb_event *ev)
{
    talker *t = (talker *)r->user;
    llmcb_code code;

    if (ev->kind == LLMCB_TEXT || ev->kind == LLMCB_CUSTOM_EVENT) return 0;
    code = t->custom ? llmcb_run_custom(ev->run, "n", str("d"))
                     : llmcb_run_text(ev->run, str("t"));
    if (is_finish(ev->kind)) t->in_finish = code;
    else CHECK_INT(code, LLMCB_OK);
    t->said += code == LLMCB_OK;
    return 0;
}

/* From every kind of handler in every event: told to all, in order, once;
 * refused in the finish, on a worker too. */
TEST(case_051_events_from_inside_handlers)
{
    int custom, bad;
    mode m, k;

    for (bad = 0; bad < 2; bad++)
        for (custom = 0; custom < 2; custom++)
            for (m = SYNC; m < N_MODES; m++) {
                const char *word = custom ? "custom:n=d" : "text:t";
                scene s;
                rec *r[N_MODES], *x = rec_new("X", m);
                talker t;
                llmcb_op *op;

                memset(&t, 0, sizeof t);
                t.custom = custom;
                scene_init(&s);
                if (bad)
                    scene_tape(&s, OK_HEAD, "a|b|c", 2, LLMCB_REPLAY_CLOSE);
                else
                    scene_tape(&s, OK_HEAD, "a|b|c" DONE, 2,
                               LLMCB_REPLAY_KEEP);
                all_modes(&s, r, 0);
                scene_add(&s, x);
                x->act = act_talk;
                x->user = &t;
                scene_open(&s);
                op = scene_call(&s);
                CHECK_INT(llmcb_op_wait(op),
                          bad ? LLMCB_ETRUNCATED : LLMCB_OK);
                CHECK_INT(t.said, bad ? 4 : 5);
                CHECK_INT(t.in_finish, LLMCB_ESTATE);
                CHECK_INT(count_of(x->log, word), t.said);
                CHECK(strncmp(x->log, "start|", 6) == 0);
                CHECK_REC(x);
                for (k = SYNC; k < N_MODES; k++) {
                    CHECK_STR(r[k]->log, x->log); /* one order for all */
                    CHECK_REC(r[k]);
                }
                /* a handler is not entered again by its own doing */
                CHECK_INT(x->peak, 1);
                llmcb_op_free(op);
                scene_close(&s);
                free_all(r);
                free(x);
                if (test_failures_here) {
                    printf("  %s, custom %d, bad %d\n", mode_names[m],
                           custom, bad);
                    return;
                }
            }
}

/* From the loop: in every state of the run; refused before, after, and when
 * the window is full. The bytes are copied. */
TEST(case_050_events_from_the_loop)
{
    scene s;
    rec *r = rec_new("A", ASYNC);
    llmcb_op *op;
    llmcb_run *run;
    char text[] = "one";

    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a" DONE, 50, LLMCB_REPLAY_KEEP);
    s.cd.limits.window_events = 3;
    scene_add(&s, r);
    r->ms = 10;
    scene_open(&s);
    CHECK_INT(llmcb_run_text(NULL, str("x")), LLMCB_ENOMEM);
    op = scene_call(&s);
    run = llmcb_op_run_at(op, 0);
    CHECK_INT(llmcb_run_custom(run, NULL, str("x")), LLMCB_EINVAL);
    CHECK_INT(llmcb_run_custom(run, "", str("x")), LLMCB_EINVAL);
    /* it has started; two fit beside the start */
    CHECK_INT(llmcb_run_text(run, str(text)), LLMCB_OK);
    CHECK_INT(llmcb_run_custom(run, text, str(text)), LLMCB_OK);
    memset(text, 'z', 3);
    CHECK_INT(llmcb_run_text(run, str("no")), LLMCB_EBUSY);
    CHECK_INT(llmcb_run_custom(run, "no", str("no")), LLMCB_EBUSY);
    while (s.spy.requests < 1) turns(&s, 1);
    CHECK(before("A>custom:one=one", "request"));
    {
        llmcb_str null = { NULL, 0 }, nul = { "x\0y", 3 };
        CHECK_INT(llmcb_run_text(run, null), LLMCB_OK);
        CHECK_INT(llmcb_run_custom(run, "n", null), LLMCB_OK);
        CHECK_INT(llmcb_run_text(run, nul), LLMCB_OK);
    }
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_INT(llmcb_run_text(run, str("late")), LLMCB_ESTATE);
    CHECK_INT(llmcb_run_custom(run, "n", str("late")), LLMCB_ESTATE);
    CHECK_STR(r->log, "start|text:one|custom:one=one|text:|custom:n=|text:x|"
                      "a||end");
    CHECK_REC(r);
    llmcb_op_free(op);
    scene_close(&s);
    free(r);
}

/* On a worker there is no EBUSY: what does not fit is queued. */
static int act_flood(rec *r, const llmcb_event *ev)
{
    int i;

    (void)r;
    if (ev->kind != LLMCB_LLM_NEW_TOKEN || *ev->token->text.ptr != 'a')
        return 0;
    for (i = 0; i < 100; i++)
        CHECK_INT(llmcb_run_text(ev->run, str("f")), LLMCB_OK);
    return 0;
}

TEST(a_worker_is_never_told_that_it_is_busy)
{
    scene s;
    rec *r = rec_new("S", SYNC), *a = rec_new("A", ASYNC);
    llmcb_op *op;

    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a|b|c|d" DONE, 0, LLMCB_REPLAY_KEEP);
    s.cd.limits.window_events = 2;
    scene_add(&s, r);
    scene_add(&s, a);
    r->act = act_flood;
    a->ms = 1;
    scene_open(&s);
    op = scene_call(&s);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_INT(count_of(r->log, "text:f"), 100);
    CHECK_STR(a->log, r->log);
    CHECK_INT(r->events, 107);
    CHECK_REC(r);
    CHECK_REC(a);
    llmcb_op_free(op);
    scene_close(&s);
    free(r);
    free(a);
}

/* ======== what a callback may not do ====================================== */

typedef struct own_op {
    scene *s;
    llmcb_op *op;
    llmcb_code codes[4];
    unsigned calls;
} own_op;

/* Awaiting an op from a handler of that same op would wait for ever. */
static llmcb_step await_own(llmcb_task *t, llmcb_handler *h,
                            const llmcb_event *ev)
{
    rec *r = (rec *)(void *)h;
    own_op *o = (own_op *)r->user;

    LLMCB_BEGIN(t);
    rec_enter(r, ev);
    LLMCB_AWAIT(t, llmcb_await(t, o->op));
    if (t->result != LLMCB_ESTATE) r->wrong = "llmcb_await";
    LLMCB_AWAIT(t, llmcb_await_all(t, &o->op, 1, LLMCB_FOREVER));
    if (t->result != LLMCB_ESTATE) r->wrong = "llmcb_await_all";
    LLMCB_AWAIT(t, llmcb_await_any(t, &o->op, 1, LLMCB_FOREVER));
    if (t->result != LLMCB_ESTATE) r->wrong = "llmcb_await_any";
    LLMCB_AWAIT(t, llmcb_await_chunk(t, o->op));
    if (t->result != LLMCB_ESTATE) r->wrong = "llmcb_await_chunk";
    if (llmcb_op_wait(o->op) != LLMCB_ESTATE) r->wrong = "llmcb_op_wait";
    return rec_leave(r, ev);
    LLMCB_END(t);
}

TEST(awaiting_the_own_op_is_refused)
{
    scene s;
    rec *r = rec_new("A", ASYNC);
    own_op o;

    memset(&o, 0, sizeof o);
    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a" DONE, 0, LLMCB_REPLAY_KEEP);
    scene_add(&s, r);
    r->h.async.on_chat_model_start = r->h.async.on_llm_new_token =
        r->h.async.on_llm_end = await_own;
    r->user = &o;
    scene_open(&s);
    o.op = scene_stream(&s);
    CHECK_INT(llmcb_op_wait(o.op), LLMCB_OK);
    CHECK_STR(r->log, "start|a||end");
    CHECK_REC(r);
    llmcb_op_free(o.op);
    scene_close(&s);
    free(r);
}

/* Running or freeing the loop inside any callback, on any thread. */
static int act_run_loop(rec *r, const llmcb_event *ev)
{
    own_op *o = (own_op *)r->user;
    const llmcb_chunk *chunk = (const llmcb_chunk *)1;

    (void)ev;
    CHECK_INT(llmcb_loop_run(o->s->loop), LLMCB_ESTATE);
    CHECK_INT(llmcb_loop_run_once(o->s->loop, 0), LLMCB_ESTATE);
    CHECK_INT(llmcb_loop_run_until(o->s->loop, o->op), LLMCB_ESTATE);
    CHECK_INT(llmcb_op_wait(o->op), LLMCB_ESTATE);
    CHECK_INT(llmcb_loop_free(o->s->loop), LLMCB_ESTATE);
    if (!llmcb_op_next(o->op, &chunk)) CHECK(!chunk);
    return 0;
}

TEST(the_loop_does_not_run_inside_a_callback)
{
    mode m;

    for (m = SYNC; m <= INLINE; m++) {
        scene s;
        rec *r = rec_new(mode_names[m], m);
        own_op o;

        memset(&o, 0, sizeof o);
        scene_init(&s);
        scene_tape(&s, OK_HEAD, "a" DONE, 0, LLMCB_REPLAY_KEEP);
        scene_add(&s, r);
        r->act = act_run_loop;
        r->user = &o;
        o.s = &s;
        scene_open(&s);
        o.op = scene_call(&s);
        CHECK_INT(llmcb_op_wait(o.op), LLMCB_OK);
        CHECK_STR(r->log, "start|a||end");
        llmcb_op_free(o.op);
        scene_close(&s);
        free(r);
    }
}

/* A handler may make another call, and a coroutine may await it. */
static llmcb_step call_inside(llmcb_task *t, llmcb_handler *h,
                              const llmcb_event *ev)
{
    rec *r = (rec *)(void *)h;
    own_op *o = (own_op *)r->user;

    LLMCB_BEGIN(t);
    rec_enter(r, ev);
    o->s->chat->own.n_callbacks = 0; /* it serves nobody */
    o->op = scene_call(o->s);
    LLMCB_AWAIT(t, llmcb_await(t, o->op));
    if (t->result != LLMCB_OK) r->wrong = "the inner call failed";
    llmcb_op_free(o->op);
    return rec_leave(r, ev);
    LLMCB_END(t);
}

TEST(a_handler_may_make_a_call)
{
    scene s;
    rec *r = rec_new("A", ASYNC);
    own_op o;
    llmcb_op *op;

    memset(&o, 0, sizeof o);
    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a" DONE, 5, LLMCB_REPLAY_KEEP);
    scene_add(&s, r);
    r->h.async.on_chat_model_start = r->h.async.on_llm_end = call_inside;
    r->user = &o;
    o.s = &s;
    scene_open(&s);
    op = scene_call(&s);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_STR(r->log, "start|a||end");
    CHECK_INT(s.spy.requests, 3);
    CHECK_REC(r);
    llmcb_op_free(op);
    scene_close(&s);
    free(r);
}

/* ======== configurations ================================================== */

/* A refused call is done at once, with a reason, and nobody is told. */
static void refused(scene *s, rec *r, llmcb_op *op, llmcb_code code)
{
    CHECK(op != NULL);
    CHECK(llmcb_op_done(op));
    CHECK_INT(llmcb_op_code(op), code);
    CHECK_INT(llmcb_op_wait(op), code);
    CHECK(*llmcb_op_error(op)->message != '\0');
    CHECK_INT(llmcb_op_result(op)->n_generations, 0);
    turns(s, 3);
    CHECK_INT(r->events, 0);
    CHECK_INT(s->spy.requests, 0);
    llmcb_op_free(op);
}

static int sync_nothing(llmcb_handler *h, const llmcb_event *ev)
{
    (void)h;
    (void)ev;
    return 0;
}

TEST(bad_configurations_are_refused)
{
    static const char *const ids[] = {
        "", "x", "01234567-89ab-4cde-8f01-23456789abc",
        "01234567-89ab-4cde-8f01-23456789abcdd",
        "01234567-89ab-4cde-8f01-23456789abcg",
        "01234567089ab-4cde-8f01-23456789abcd"
    };
    scene s;
    rec *r = rec_new("I", INLINE), *both = rec_new("B", ASYNC);
    llmcb_handler *list[2];
    llmcb_config config, none;
    llmcb_message m;
    llmcb_prompt p;
    llmcb_tool_call call;
    size_t i;

    memset(&none, 0, sizeof none);
    memset(&m, 0, sizeof m);
    m.content = "hi";
    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a" DONE, 0, LLMCB_REPLAY_KEEP);
    scene_add(&s, r);
    scene_open(&s);
    list[0] = &r->h;
    list[1] = NULL;
    config = none;
    config.callbacks = list;
    config.n_callbacks = 2;
    refused(&s, r, call_config(&s, &config), LLMCB_EINVAL);
    both->h.sync.on_llm_end = sync_nothing;
    list[1] = &both->h;
    refused(&s, r, call_config(&s, &config), LLMCB_EINVAL);
    config = none;
    config.local_callbacks = list;
    config.n_local_callbacks = 2;
    refused(&s, r, call_config(&s, &config), LLMCB_EINVAL);
    for (i = 0; i < 6; i++) {
        config = none;
        if (i == 0) config.n_callbacks = 1;
        if (i == 1) config.n_local_callbacks = 1;
        if (i == 2) config.n_tags = 1;
        if (i == 3) config.n_local_tags = 1;
        if (i == 4) config.n_metadata = 1;
        if (i == 5) config.n_local_metadata = 1;
        refused(&s, r, call_config(&s, &config), LLMCB_EINVAL);
    }
    for (i = 0; i < sizeof ids / sizeof *ids; i++) {
        config = none;
        config.run_id = ids[i];
        refused(&s, r, call_config(&s, &config), LLMCB_EINVAL);
        config = none;
        config.parent_id = ids[i];
        refused(&s, r, call_config(&s, &config), LLMCB_EINVAL);
    }
    refused(&s, r, llmcb_chat_generate(s.chat, NULL, 1, NULL), LLMCB_EINVAL);
    refused(&s, r, llmcb_chat_generate(s.chat, &m, 0, NULL), LLMCB_EINVAL);
    refused(&s, r, llmcb_chat_stream(s.chat, &m, 0, NULL), LLMCB_EINVAL);
    refused(&s, r, llmcb_chat_batch(s.chat, NULL, 1, NULL), LLMCB_EINVAL);
    p.messages = &m;
    p.n = 1;
    refused(&s, r, llmcb_chat_batch(s.chat, &p, 0, NULL), LLMCB_EINVAL);
    m.role = (llmcb_role)99;
    refused(&s, r, llmcb_chat_generate(s.chat, &m, 1, NULL), LLMCB_EINVAL);
    m.role = LLMCB_TOOL;
    refused(&s, r, llmcb_chat_generate(s.chat, &m, 1, NULL), LLMCB_EINVAL);
    m.role = LLMCB_USER;
    m.n_tool_calls = 1;
    refused(&s, r, llmcb_chat_generate(s.chat, &m, 1, NULL), LLMCB_EINVAL);
    m.n_tool_calls = 0;
    m.parts = "{}";
    refused(&s, r, llmcb_chat_generate(s.chat, &m, 1, NULL), LLMCB_EINVAL);
    m.parts = NULL;
    m.content = "a\xC3";
    refused(&s, r, llmcb_chat_generate(s.chat, &m, 1, NULL), LLMCB_EUTF8);
    m.content = "\xC3\xA9";
    m.content_len = 1;
    refused(&s, r, llmcb_chat_generate(s.chat, &m, 1, NULL), LLMCB_EUTF8);
    m.content_len = 0;
    m.name = "\xFF";
    refused(&s, r, llmcb_chat_generate(s.chat, &m, 1, NULL), LLMCB_EUTF8);
    m.name = NULL;
    memset(&call, 0, sizeof call);
    call.id = call.name = str("x");
    call.arguments = str("\xED\xA0\x80"); /* half a pair */
    m.role = LLMCB_ASSISTANT;
    m.tool_calls = &call;
    m.n_tool_calls = 1;
    refused(&s, r, llmcb_chat_generate(s.chat, &m, 1, NULL), LLMCB_EUTF8);
    call.arguments = str("{}");
    p.messages = &m; /* one bad prompt spoils the batch */
    {
        llmcb_prompt two[2];
        llmcb_message bad;
        memset(&bad, 0, sizeof bad);
        bad.content = "\x80";
        two[0] = p;
        two[1].messages = &bad;
        two[1].n = 1;
        refused(&s, r, llmcb_chat_batch(s.chat, two, 2, NULL), LLMCB_EUTF8);
        two[1].n = 0;
        refused(&s, r, llmcb_chat_batch(s.chat, two, 2, NULL), LLMCB_EINVAL);
    }
    CHECK(!llmcb_chat_generate(NULL, &m, 1, NULL));
    both->h.sync.on_llm_end = NULL;
    both->h.frame_size = SIZE_MAX - 8;
    list[1] = &both->h;
    config = none;
    config.callbacks = list;
    config.n_callbacks = 2;
    refused(&s, r, call_config(&s, &config), LLMCB_EINVAL);
    scene_close(&s);
    free(r);
    free(both);
}

/* A handler of the chat that is no good: every call says so. */
TEST(bad_handlers_of_a_chat_are_refused)
{
    scene s;
    rec *r = rec_new("I", INLINE), *both = rec_new("B", ASYNC);
    int i;

    for (i = 0; i < 2; i++) {
        scene_init(&s);
        scene_tape(&s, OK_HEAD, "a" DONE, 0, LLMCB_REPLAY_KEEP);
        scene_add(&s, r);
        s.handlers[s.n_handlers++] = i ? &both->h : NULL;
        both->h.sync.on_llm_new_token = sync_nothing;
        scene_open(&s);
        CHECK_INT(llmcb_chat_error(s.chat)->code, LLMCB_EINVAL);
        refused(&s, r, scene_call(&s), LLMCB_EINVAL);
        refused(&s, r, scene_stream(&s), LLMCB_EINVAL);
        refused(&s, r, call_batch(&s, 2, NULL), LLMCB_EINVAL);
        scene_close(&s);
    }
    free(r);
    free(both);
}

/* A NULL among the elements of a list is refused as a NULL list is. In a
 * child, since it may crash. */
static int null_element(int which)
{
    scene s;
    rec *r = rec_new("I", INLINE);
    const char *tags[] = { "a", NULL };
    llmcb_pair pair;
    llmcb_config config;
    llmcb_op *op;
    int code;

    memset(&config, 0, sizeof config);
    pair.key = which % 3 == 1 ? NULL : "k";
    pair.value = which % 3 == 2 ? NULL : "v";
    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a" DONE, 0, LLMCB_REPLAY_KEEP);
    scene_add(&s, r);
    if (which == 6) {
        config.local_tags = tags;
        config.n_local_tags = 2;
    } else if (which > 6) {
        config.local_metadata = &pair;
        config.n_local_metadata = 1;
    } else if (which == 0) {
        config.tags = tags;
        config.n_tags = 2;
    } else if (which < 3) {
        config.metadata = &pair;
        config.n_metadata = 1;
    } else if (which % 3 == 0) {
        s.cd.tags = tags;
        s.cd.n_tags = 2;
    } else {
        s.cd.metadata = &pair;
        s.cd.n_metadata = 1;
    }
    scene_open(&s);
    op = call_config(&s, &config);
    code = llmcb_op_done(op) ? llmcb_op_code(op) : LLMCB_EBUSY;
    llmcb_op_free(op);
    scene_close(&s);
    free(r);
    return code;
}

TEST(null_labels_are_refused)
{
    int which, status;

    for (which = 0; which < 9; which++) {
        pid_t child;
        fflush(stdout);
        child = fork();
        REQUIRE(child >= 0);
        if (child == 0) {
            int null = open("/dev/null", O_WRONLY);
            if (null >= 0) dup2(null, 2); /* a crash need not be told twice */
            test_exit(null_element(which) == LLMCB_EINVAL ? 0 : 1);
        }
        status = -1;
        CHECK(waitpid(child, &status, 0) == child);
        if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
            TEST_FAIL("NULL label %d: status %d", which, status);
    }
}

/* ======== what is asked ==================================================== */

#define LONG_QUESTION 100000

/* It goes with the first byte of an answer once the transport has sent it, in
 * either order; a transport that does not say so has it to the end, and so
 * has a cache, whose key it is. */
TEST(a_request_goes_when_nobody_needs_it)
{
    enum { NEVER, BEFORE, BEHIND, CACHED };
    char *text = (char *)malloc(LONG_QUESTION + 1);
    int how;

    REQUIRE(text);
    memset(text, 'x', LONG_QUESTION);
    text[LONG_QUESTION] = '\0';
    for (how = NEVER; how <= CACHED; how++) {
        llmcb_message question;
        llmcb_chat_desc cd;
        llmcb_chat *chat;
        llmcb_op *op;
        scene s;

        memset(&question, 0, sizeof question);
        question.role = LLMCB_USER;
        question.content = text;
        scene_init(&s);
        s.fed = true;
        scene_open(&s);
        cd = s.cd;
        cd.streaming = true;
        if (how == CACHED) cd.cache = llmcb_cache_new(s.loop, 0);
        chat = llmcb_chat_new(s.loop, &cd);
        op = llmcb_chat_generate(chat, &question, 1, NULL);
        while (s.spy.requests < 1) turns(&s, 1);
        llmcb_exchange_sent(how == BEHIND ? NULL : s.spy.fed);
        if (how == NEVER) { /* another call, which is not told of */
            llmcb_op_cancel(op);
            llmcb_op_wait(op);
            llmcb_op_free(op);
            op = llmcb_chat_generate(chat, &question, 1, NULL);
            while (s.spy.requests < 2) turns(&s, 1);
        }
        CHECK(s.heap.bytes > LONG_QUESTION); /* there may be another attempt */
        feed_head(&s);
        feed_events(&s, "a");
        if (how == BEHIND) {
            CHECK(s.heap.bytes > LONG_QUESTION);
            llmcb_exchange_sent(s.spy.fed);
        }
        CHECK_INT(s.heap.bytes > LONG_QUESTION, how == NEVER || how == CACHED);
        feed_events(&s, "b" DONE);
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        CHECK_STR(llmcb_op_text(op).ptr, "ab");
        if (how != CACHED) CHECK(s.heap.bytes < LONG_QUESTION);
        llmcb_op_free(op);
        if (how == CACHED) {
            op = llmcb_chat_generate(chat, &question, 1, NULL);
            CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
            CHECK_INT(s.spy.requests, 1);
            llmcb_op_free(op);
        }
        llmcb_chat_free(chat);
        llmcb_cache_free(cd.cache);
        scene_close(&s);
    }
    free(text);
}

/* A request that is sent and refused is asked again, whole. */
TEST(a_request_that_was_sent_can_be_asked_again)
{
    char first[sizeof((spy *)0)->body];
    llmcb_op *op;
    scene s;

    scene_init(&s);
    s.fed = true;
    scene_open(&s);
    op = scene_call(&s);
    while (s.spy.requests < 1) turns(&s, 1);
    strcpy(first, s.spy.body);
    llmcb_exchange_connected(s.spy.fed);
    llmcb_exchange_sent(s.spy.fed);
    llmcb_exchange_status(s.spy.fed, 500);
    llmcb_exchange_data(s.spy.fed, "busy", 4);
    llmcb_exchange_end(s.spy.fed, LLMCB_ORDERLY, LLMCB_OK, 0, NULL);
    while (s.spy.requests < 2) llmcb_loop_run_once(s.loop, -1);
    CHECK_STR(s.spy.body, first);
    feed_head(&s);
    feed_events(&s, "a" DONE);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    llmcb_op_free(op);
    scene_close(&s);
}

/* ======== a handler by itself ============================================= */

/* A lone inline handler that raises in a token gets no other, though they came
 * at once; what it says in there comes behind that token. */
static int act_lone(rec *r, const llmcb_event *ev)
{
    if (ev->kind != LLMCB_LLM_NEW_TOKEN || ev->token->text.ptr[0] != 'a')
        return 0;
    if (r->user) return FAILED;
    CHECK_INT(llmcb_run_text(ev->run, str("t")), LLMCB_OK);
    return 0;
}

TEST(a_lone_inline_handler_among_tokens)
{
    /* the first token of a read is told from the log, the others are not */
    static const char *const fed[] = { "a|b|c", "x|a|b|c", "x|a", "a" };
    static const char *const logs[][2] = {
        { "start|a|text:t|b|c|error:ECANCELLED", "start|a|error:EHANDLER" },
        { "start|x|a|text:t|b|c|error:ECANCELLED", "start|x|a|error:EHANDLER" },
        { "start|x|a|text:t|error:ECANCELLED", "start|x|a|error:EHANDLER" },
        { "start|x|a|text:t|error:ECANCELLED", "start|x|a|error:EHANDLER" }
    };
    size_t i, raises;

    for (i = 0; i < 8; i++) {
        scene s;
        rec *r = rec_new("I", INLINE);
        llmcb_op *op;

        raises = i % 2;
        scene_init(&s);
        s.fed = true;
        scene_add(&s, r);
        r->h.flags |= LLMCB_RAISE;
        r->act = act_lone;
        r->user = raises ? r : NULL;
        scene_open(&s);
        op = scene_call(&s);
        while (s.spy.requests < 1) turns(&s, 1);
        feed_head(&s);
        if (i >= 6) feed_events(&s, "x"); /* a turn before */
        feed_events(&s, fed[i / 2]);
        turns(&s, 3);
        if (!raises) llmcb_op_cancel(op);
        CHECK_INT(llmcb_op_wait(op),
                  raises ? LLMCB_EHANDLER : LLMCB_ECANCELLED);
        CHECK_STR(r->log, logs[i / 2][raises]);
        CHECK_REC(r);
        llmcb_op_free(op);
        scene_close(&s);
        free(r);
    }
}

/* One that takes no tokens is not passed by with what it does take. */
TEST(who_takes_no_tokens_gets_the_rest)
{
    static const mode kinds[] = { SYNC, ASYNC, INLINE };
    size_t k;

    for (k = 0; k < 3; k++) {
        scene s;
        rec *first = rec_new("I", INLINE), *r = rec_new("R", kinds[k]);
        llmcb_op *op;

        scene_init(&s);
        s.fed = true;
        scene_add(&s, first);
        scene_add(&s, r);
        first->act = act_lone;
        r->h.sync.on_llm_new_token = NULL;
        r->h.async.on_llm_new_token = NULL;
        scene_open(&s);
        op = scene_call(&s);
        while (s.spy.requests < 1) turns(&s, 1);
        feed_head(&s);
        /* two reads in one turn */
        llmcb_loop_post(s.loop, feed_arrive, feed_new(&s, "x|a|b"));
        feed_events(&s, "c|d" DONE);
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        CHECK_STR(first->log, k == 2 ? "start|x|a|text:t|b|c|d||end"
                                     : "start|x|a|b|text:t|c|d||end");
        CHECK_STR(r->log, "start|text:t|end");
        CHECK_REC(first);
        CHECK_REC(r);
        llmcb_op_free(op);
        scene_close(&s);
        free(first);
        free(r);
    }
}

/* Tokens and an event of the program between them, all in the log before the
 * handler is given any. */
typedef struct mixture {
    scene *s;
    llmcb_run *run;
} mixture;

static void mixture_arrive(void *arg)
{
    mixture *m = (mixture *)arg;
    char bytes[512];

    llmcb_exchange_data(m->s->spy.fed, bytes,
                        events_text(bytes, "a|b", NULL, NULL));
    CHECK_INT(llmcb_run_text(m->run, str("t")), LLMCB_OK);
    llmcb_exchange_data(m->s->spy.fed, bytes,
                        events_text(bytes, "c", NULL, NULL));
}

TEST(a_lone_inline_handler_of_tokens_and_texts)
{
    scene s;
    rec *r = rec_new("I", INLINE);
    mixture m = { &s, NULL };
    llmcb_op *op;

    scene_init(&s);
    s.fed = true;
    scene_add(&s, r);
    scene_open(&s);
    op = scene_call(&s);
    m.run = llmcb_op_run_at(op, 0);
    while (s.spy.requests < 1) turns(&s, 1);
    feed_head(&s);
    llmcb_loop_post(s.loop, mixture_arrive, &m);
    turns(&s, 3);
    CHECK_STR(r->log, "start|a|b|text:t|c");
    llmcb_op_cancel(op);
    llmcb_op_wait(op);
    CHECK_REC(r);
    llmcb_op_free(op);
    scene_close(&s);
    free(r);
}

/* A coroutine that is cancelled at its await and says so has not failed; one
 * that says so of its own accord has. */
static int act_say_cancelled(rec *r, const llmcb_event *ev)
{
    return ev->kind == LLMCB_LLM_NEW_TOKEN && (r->cancelled || r->user)
               ? (int)LLMCB_ECANCELLED
               : 0;
}

TEST(a_cancelled_coroutine_that_says_so_has_not_failed)
{
    unsigned i;

    for (i = 0; i < 4; i++) {
        scene s;
        rec *r = rec_new("A", ASYNC);
        bool alone = i / 2 == 1;
        char lines[512] = "";
        llmcb_op *op;

        scene_init(&s);
        s.fed = true;
        s.ld.log = keep_line;
        s.ld.log_user = lines;
        scene_add(&s, r);
        r->h.flags |= i % 2 ? LLMCB_RAISE : 0;
        r->act = act_say_cancelled;
        r->user = alone ? r : NULL;
        r->ms = alone ? 0 : 1000000;
        scene_open(&s);
        op = scene_call(&s);
        while (s.spy.requests < 1) {
            turns(&s, 1);
            llmcb_clock_advance(s.loop, 1000000);
        }
        feed_head(&s);
        feed_events(&s, "a");
        while (!noted("A<a")) turns(&s, 1);
        if (!alone) llmcb_op_cancel(op);
        turns(&s, 3);
        if (alone && i % 2 == 0) llmcb_op_cancel(op);
        while (!llmcb_op_done(op)) {
            turns(&s, 1);
            llmcb_clock_advance(s.loop, 1000000);
        }
        CHECK_INT(llmcb_op_code(op),
                  alone && i % 2 ? LLMCB_EHANDLER : LLMCB_ECANCELLED);
        CHECK_INT(llmcb_op_error(op)->handler_result,
                  alone && i % 2 ? LLMCB_ECANCELLED : 0);
        CHECK_INT(lines[0] != '\0', alone && i % 2 == 0);
        CHECK_REC(r);
        llmcb_op_free(op);
        scene_close(&s);
        free(r);
    }
}

TEST(a_failing_handler_without_a_name)
{
    scene s;
    rec *r = rec_new("I", INLINE);
    char lines[512] = "";
    unsigned at = 1;
    llmcb_op *op;

    scene_init(&s);
    s.ld.log = keep_line;
    s.ld.log_user = lines;
    scene_tape(&s, OK_HEAD, "a" DONE, 0, LLMCB_REPLAY_KEEP);
    scene_add(&s, r);
    r->h.name = NULL;
    r->act = act_fail_at;
    r->user = &at;
    scene_open(&s);
    op = scene_call(&s);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK(strstr(lines, "handler (no name) failed in on_chat_model_start"));
    llmcb_op_free(op);
    scene_close(&s);
    free(r);
}

/* ======== awaiting a run ================================================== */

static llmcb_step await_the_run(llmcb_task *t)
{
    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_await_run(t, (llmcb_run *)t->self));
    return t->result;
    LLMCB_END(t);
}

/* Nothing else wakes the loop, and the run is open and its window empty: the
 * worker must be told how far it is waited for. */
TEST(a_coroutine_that_awaits_a_run_is_woken_by_its_worker)
{
    gate g = GATE;
    scene s;
    rec *r = rec_new("S", SYNC);
    llmcb_op *op, *task;

    scene_init(&s);
    s.fed = true;
    s.ld.virtual_clock = false;
    scene_add(&s, r);
    r->gate = &g;
    r->gate_kind = LLMCB_TEXT;
    scene_open(&s);
    op = scene_call(&s);
    while (s.spy.requests < 1) llmcb_loop_run_once(s.loop, 10);
    CHECK_INT(llmcb_run_text(llmcb_op_run_at(op, 0), str("t")), LLMCB_OK);
    turn_to_gate(&s, &g, 1);
    task = llmcb_task_start(s.loop, await_the_run, 0, llmcb_op_run_at(op, 0));
    turns(&s, 3);
    CHECK(!llmcb_op_done(task));
    gate_let(&g, ALL);
    pool_rests(&s); /* from here on nobody calls */
    CHECK_INT(llmcb_op_wait(task), LLMCB_OK);
    CHECK_STR(r->log, "start|text:t");
    llmcb_op_free(task);
    llmcb_op_cancel(op);
    llmcb_op_wait(op);
    CHECK_REC(r);
    llmcb_op_free(op);
    scene_close(&s);
    free(r);
}

static int act_speak_at_the_end(rec *r, const llmcb_event *ev)
{
    (void)r;
    if (ev->token && ev->token->parts->finish_reason.len)
        CHECK_INT(llmcb_run_text(ev->run, str("t")), LLMCB_OK);
    return 0;
}

typedef struct window {
    scene *s;
    gate *g;
} window;

static void let_and_rest(void *arg)
{
    window *w = (window *)arg;

    gate_let(w->g, ALL);
    pool_rests(w->s);
}

/* The loop has taken the posts and hears that the worker has come so far; the
 * worker posts an event and is done before the loop looks at it. The event
 * comes before the finish all the same. */
TEST(an_event_posted_while_posts_are_served)
{
    gate g = GATE;
    scene s;
    rec *r = rec_new("S", SYNC_TOKENS);
    window w;
    llmcb_op *op;

    scene_init(&s);
    s.fed = true;
    scene_add(&s, r);
    r->act = act_speak_at_the_end;
    r->gate = &g;
    r->gate_kind = LLMCB_LLM_NEW_TOKEN;
    scene_open(&s);
    op = scene_call(&s);
    while (s.spy.requests < 1) llmcb_loop_run_once(s.loop, 0);
    feed_head(&s);
    feed_events(&s, "a|b|c|d|e|f|g|h|$|[DONE]");
    turn_to_gate(&s, &g, 1);
    turns(&s, 3); /* the worker may go to the last token */
    gate_let(&g, LLMCBI_STRAND_BATCH);
    gate_wait(&g, LLMCBI_STRAND_BATCH + 1); /* and has said so once */
    w.s = &s;
    w.g = &g;
    CHECK_INT(llmcb_loop_post(s.loop, let_and_rest, &w), LLMCB_OK);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK(strstr(r->log, "|text:t|end") != NULL);
    CHECK_REC(r);
    llmcb_op_free(op);
    scene_close(&s);
    free(r);
}

/* So is who reads chunks: they follow the handlers, and nothing else may come
 * for a long time. */
TEST(a_reader_of_chunks_is_woken_by_the_worker)
{
    gate g = GATE;
    scene s;
    rec *r = rec_new("S", SYNC);
    const llmcb_chunk *chunk;
    llmcb_op *op;

    scene_init(&s);
    s.fed = true;
    s.ld.virtual_clock = false;
    scene_add(&s, r);
    r->gate = &g;
    r->gate_kind = LLMCB_LLM_NEW_TOKEN;
    scene_open(&s);
    op = scene_stream(&s);
    while (s.spy.requests < 1) llmcb_loop_run_once(s.loop, 10);
    feed_head(&s);
    feed_events(&s, "a");
    turn_to_gate(&s, &g, 1);
    gate_let(&g, ALL);
    pool_rests(&s); /* from here on nobody calls */
    REQUIRE(llmcb_op_next(op, &chunk));
    CHECK_STR(chunk->text.ptr, "a");
    llmcb_op_cancel(op);
    CHECK_INT(llmcb_op_wait(op), LLMCB_ECANCELLED);
    CHECK_REC(r);
    llmcb_op_free(op);
    scene_close(&s);
    free(r);
}

/* ... and one that awaits it as the call, the task or the loop goes is told,
 * once. */
TEST(a_coroutine_that_awaits_a_run_is_told_of_its_end)
{
    int how;

    for (how = 0; how < 4; how++) {
        scene s;
        rec *r = rec_new("A", ASYNC);
        llmcb_op *op, *task;

        scene_init(&s);
        s.fed = true;
        scene_add(&s, r);
        scene_open(&s);
        op = scene_call(&s);
        while (s.spy.requests < 1) turns(&s, 1);
        r->ms = 1000000;
        CHECK_INT(llmcb_run_text(llmcb_op_run_at(op, 0), str("t")), LLMCB_OK);
        task = llmcb_task_start(s.loop, await_the_run, 0,
                                llmcb_op_run_at(op, 0));
        while (!noted("A<text:t")) turns(&s, 1);
        CHECK(!llmcb_op_done(task));
        if (how == 0) llmcb_op_cancel(op);
        if (how == 1) llmcb_op_free(op);
        if (how == 2) llmcb_op_cancel(task);
        if (how < 3) {
            llmcb_code code = llmcb_op_wait(task);
            CHECK_INT(code, how == 2 ? LLMCB_ECANCELLED : LLMCB_OK);
            CHECK_INT(r->cancelled, how == 2 ? 0 : 1);
            llmcb_op_free(task);
        }
        if (how != 1) llmcb_op_free(op);
        if (how == 3) llmcb_op_free(task);
        scene_close(&s);
        CHECK_REC(r);
        free(r);
    }
}

TEST(a_run_of_another_loop_is_not_awaited)
{
    scene s[2];
    rec *r = rec_new("A", ASYNC);
    llmcb_op *op, *task;

    scene_init(&s[0]);
    s[0].fed = true;
    scene_add(&s[0], r);
    scene_open(&s[0]);
    scene_init(&s[1]);
    scene_open(&s[1]);
    op = scene_call(&s[0]);
    turns(&s[0], 1);
    task = llmcb_task_start(s[1].loop, await_the_run, 0,
                            llmcb_op_run_at(op, 0));
    CHECK_INT(llmcb_op_wait(task), LLMCB_EINVAL);
    llmcb_op_free(task);
    llmcb_op_free(op);
    scene_close(&s[0]);
    scene_close(&s[1]);
    CHECK_REC(r);
    free(r);
}

/* What nobody could hold is refused before it is read. */
TEST(texts_beyond_all_bounds_are_refused)
{
    scene s;
    llmcb_str text = { "x", SIZE_MAX };
    llmcb_op *op;

    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a" DONE, 50, LLMCB_REPLAY_KEEP);
    scene_open(&s);
    op = scene_call(&s);
    CHECK_INT(llmcb_run_text(llmcb_op_run_at(op, 0), text), LLMCB_EINVAL);
    CHECK_INT(llmcb_run_custom(llmcb_op_run_at(op, 0), "n", text),
              LLMCB_EINVAL);
    text.len = SIZE_MAX / 4;
    if (text.len > UINT32_MAX) /* no record is so long */
        CHECK_INT(llmcb_run_text(llmcb_op_run_at(op, 0), text), LLMCB_ENOMEM);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    llmcb_op_free(op);
    scene_close(&s);
}

/* More than a few hooks: each is told, and none twice. */
TEST(many_hooks)
{
    enum { MANY = 9 };
    scene s;
    rec *r[MANY];
    llmcb_op *op;
    int i;

    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a" DONE, 0, LLMCB_REPLAY_KEEP);
    scene_open(&s);
    for (i = 0; i < MANY; i++) {
        r[i] = rec_new("H", INLINE);
        CHECK_INT(llmcb_loop_hook(s.loop, &r[i]->h), LLMCB_OK);
        CHECK_INT(llmcb_loop_hook(s.loop, &r[i]->h), LLMCB_OK);
    }
    llmcb_loop_unhook(s.loop, &r[4]->h);
    op = scene_call(&s);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    for (i = 0; i < MANY; i++) {
        CHECK_STR(r[i]->log, i == 4 ? "" : "start|a||end");
        CHECK_REC(r[i]);
    }
    llmcb_op_free(op);
    scene_close(&s);
    for (i = 0; i < MANY; i++) free(r[i]);
}

/* ======== the pull interface ============================================== */

/* What handlers were not given, the consumer is not either; it is the last to
 * see a chunk. */
TEST(pull_comes_behind_every_handler)
{
    mode m;

    for (m = SYNC; m < N_MODES; m++) {
        scene s;
        rec *r[N_MODES], *slow = rec_new("slow", m);
        const llmcb_chunk *chunk;
        llmcb_op *op;
        char all[64] = "";
        unsigned n = 0;
        mode k;

        scene_init(&s);
        scene_tape(&s, OK_HEAD, "a|b|c|d" DONE, 0, LLMCB_REPLAY_KEEP);
        s.cd.limits.window_events = 3;
        all_modes(&s, r, 0);
        scene_add(&s, slow);
        slow->ms = 20;
        scene_open(&s);
        op = scene_stream(&s);
        while (llmcb_op_next(op, &chunk)) {
            n++;
            strcat(strcat(all, chunk->text.ptr), ",");
            for (k = SYNC; k < N_MODES; k++) {
                pthread_mutex_lock(&r[k]->m);
                CHECK(r[k]->done >= n + 1);
                pthread_mutex_unlock(&r[k]->m);
            }
            pthread_mutex_lock(&slow->m);
            CHECK(slow->done >= n + 1);
            pthread_mutex_unlock(&slow->m);
        }
        CHECK_STR(all, "a,b,c,d,,");
        CHECK(llmcb_op_done(op));
        CHECK_INT(llmcb_op_code(op), LLMCB_OK);
        for (k = SYNC; k < N_MODES; k++) CHECK_REC(r[k]);
        llmcb_op_free(op);
        scene_close(&s);
        free_all(r);
        free(slow);
    }
}

/* A consumer that does not read holds the answer up at the window, and a wait
 * throws away what it has not read. */
TEST(pull_holds_the_window_and_wait_discards)
{
    int64_t gap;

    for (gap = 0; gap < 2; gap++) { /* in one piece, and one by one */
        scene s;
        rec *r = rec_new("A", ASYNC);
        const llmcb_chunk *chunk;
        llmcb_op *op;

        scene_init(&s);
        scene_tape(&s, OK_HEAD, "a|b|c|d|e|f" DONE, gap, LLMCB_REPLAY_KEEP);
        s.cd.limits.window_events = 3;
        scene_add(&s, r);
        scene_open(&s);
        op = scene_stream(&s);
        turns(&s, 50);
        CHECK_STR(r->log, "start|a|b|c");
        CHECK(llmcb_op_next(op, &chunk));
        CHECK_STR(chunk->text.ptr, "a");
        turns(&s, 50);
        CHECK_STR(chunk->text.ptr, "a"); /* valid until the next call */
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        CHECK_STR(r->log, "start|a|b|c|d|e|f||end");
        CHECK(!llmcb_op_next(op, &chunk));
        CHECK(!chunk);
        CHECK_STR(llmcb_op_result(op)->generations[0].text.ptr, "abcdef");
        CHECK_REC(r);
        llmcb_op_free(op);
        scene_close(&s);
        free(r);
    }
}

/* Events that are no chunks take room, too: it is given back as the consumer
 * passes them. */
TEST(pull_passes_what_is_no_chunk)
{
    unsigned w;

    for (w = 1; w <= 3; w++) {
        scene s;
        const llmcb_chunk *chunk;
        llmcb_op *op;
        llmcb_run *run;
        char all[64] = "";

        scene_init(&s);
        scene_tape(&s, RETRY_HEAD, "", 0, LLMCB_REPLAY_KEEP);
        scene_tape(&s, OK_HEAD, "a|b" DONE, 10, LLMCB_REPLAY_KEEP);
        s.cd.limits.window_events = w;
        scene_open(&s);
        op = scene_stream(&s);
        run = llmcb_op_run_at(op, 0);
        turn_to_request(&s, 1);
        while (llmcb_run_text(run, str("t")) == LLMCB_OK) continue;
        while (llmcb_op_next(op, &chunk))
            strcat(strcat(all, chunk->text.ptr), ",");
        CHECK_STR(all, "a,b,,");
        CHECK_INT(llmcb_op_code(op), LLMCB_OK);
        llmcb_op_free(op);
        scene_close(&s);
    }
}

/* What was in the log when the op ended can still be read. */
TEST(pull_reads_on_when_the_op_is_done)
{
    int broken;

    for (broken = 0; broken < 2; broken++) {
        scene s;
        rec *r = rec_new("S", SYNC);
        const llmcb_chunk *chunk;
        llmcb_op *op;
        char all[64] = "";

        scene_init(&s);
        if (broken)
            scene_tape(&s, OK_HEAD, "a|b|c", 0, LLMCB_REPLAY_RESET);
        else
            scene_tape(&s, OK_HEAD, "a|b|c" DONE, 0, LLMCB_REPLAY_KEEP);
        scene_add(&s, r);
        scene_open(&s);
        op = scene_stream(&s);
        CHECK_INT(llmcb_loop_run(s.loop), LLMCB_OK);
        CHECK(llmcb_op_done(op));
        while (llmcb_op_next(op, &chunk))
            strcat(strcat(all, chunk->text.ptr), ",");
        CHECK_STR(all, broken ? "a,b,c," : "a,b,c,,");
        CHECK_INT(llmcb_op_code(op), broken ? LLMCB_EIO : LLMCB_OK);
        CHECK(!llmcb_op_next(op, NULL));
        CHECK(!llmcb_op_next(NULL, &chunk));
        CHECK_REC(r);
        llmcb_op_free(op);
        scene_close(&s);
        free(r);
    }
}

/* After a cancel there is nothing more to read than what handlers saw: the
 * pull interface is a cursor like theirs, and skips with them. */
TEST(pull_ends_at_a_cancel)
{
    scene s;
    rec *r = rec_new("A", ASYNC);
    const llmcb_chunk *chunk;
    llmcb_op *op;
    char all[64] = "";

    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a|b|c|d" DONE, 0, LLMCB_REPLAY_KEEP);
    scene_add(&s, r);
    r->ms = 100;
    scene_open(&s);
    op = scene_stream(&s);
    while (!noted("A<b")) turns(&s, 1);
    llmcb_op_cancel(op);
    while (llmcb_op_next(op, &chunk))
        strcat(strcat(all, chunk->text.ptr), ",");
    CHECK_INT(llmcb_op_code(op), LLMCB_ECANCELLED);
    CHECK_STR(r->log, "start|a|b|error:ECANCELLED-3");
    CHECK(strcmp(all, "a,b,") == 0 || strcmp(all, "a,") == 0 || !*all);
    CHECK_REC(r);
    llmcb_op_free(op);
    scene_close(&s);
    free(r);
}

/* A consumer that breaks: the request is dropped, the handlers are told. */
TEST(case_065_break_early)
{
    unsigned after;

    for (after = 0; after <= 4; after++) {
        scene s;
        rec *r[N_MODES];
        const llmcb_chunk *chunk;
        llmcb_op *op;
        unsigned i;
        mode m;

        scene_init(&s);
        scene_tape(&s, OK_HEAD, "a|b|c|d" DONE, 10, LLMCB_REPLAY_KEEP);
        all_modes(&s, r, 0);
        scene_open(&s);
        op = scene_stream(&s);
        for (i = 0; i < after; i++) CHECK(llmcb_op_next(op, &chunk));
        llmcb_op_free(op);
        turn_to_end(&s);
        CHECK(!after || noted("dropped"));
        for (m = SYNC; m < N_MODES; m++) {
            CHECK_REC(r[m]);
            CHECK_INT(r[m]->starts, after > 0);
            if (after)
                CHECK(told_then(r[m], "start|a|b|c|d", "error:ECANCELLED"));
        }
        scene_close(&s);
        free_all(r);
    }
}

/* A coroutine that reads chunks as they come. */
typedef struct reader {
    llmcb_op *op;
    char all[64];
    unsigned waits;
    llmcb_code last;
    bool stop_waiting; /* wait once only */
} reader;

static llmcb_step read_chunks(llmcb_task *t)
{
    reader *r = (reader *)t->self;
    const llmcb_chunk *chunk;

    LLMCB_BEGIN(t);
    for (;;) {
        while (llmcb_op_next(r->op, &chunk))
            strcat(strcat(r->all, chunk->text.ptr), ",");
        if (llmcb_op_done(r->op)) break;
        LLMCB_AWAIT(t, llmcb_await_chunk(t, r->op));
        r->last = t->result;
        if (++r->waits >= 50 || r->stop_waiting || r->last != LLMCB_OK)
            return r->last;
    }
    LLMCB_END(t);
}

TEST(a_coroutine_awaits_chunks)
{
    mode m;

    for (m = SYNC; m < N_MODES; m++) {
        scene s;
        rec *r = rec_new(mode_names[m], m);
        llmcb_op *task;
        reader x;

        memset(&x, 0, sizeof x);
        scene_init(&s);
        scene_tape(&s, OK_HEAD, "a|b|c" DONE, 10, LLMCB_REPLAY_KEEP);
        scene_add(&s, r);
        r->ms = 3;
        scene_open(&s);
        x.op = scene_stream(&s);
        task = llmcb_task_start(s.loop, read_chunks, 0, &x);
        CHECK_INT(llmcb_op_wait(task), LLMCB_OK);
        CHECK_STR(x.all, "a,b,c,,");
        CHECK(llmcb_op_done(x.op));
        CHECK(x.waits >= 4 && x.waits <= 6); /* not a turn each */
        CHECK_REC(r);
        llmcb_op_free(task);
        llmcb_op_free(x.op);
        scene_close(&s);
        free(r);
    }
}

/* Where there is nothing to read, or nothing any more, it ends with the op
 * and not before: else a coroutine that reads would go round and round. */
TEST(await_chunk_waits_for_the_end_when_there_is_nothing_to_read)
{
    int how;

    for (how = 0; how < 2; how++) {
        scene s;
        llmcb_op *task;
        reader x;

        memset(&x, 0, sizeof x);
        scene_init(&s);
        scene_tape(&s, OK_HEAD, "a|b|c" DONE, 10, LLMCB_REPLAY_KEEP);
        scene_open(&s);
        x.op = how ? scene_stream(&s) : scene_call(&s);
        task = llmcb_task_start(s.loop, read_chunks, 0, &x);
        if (how) CHECK_INT(llmcb_op_wait(x.op), LLMCB_OK); /* discards */
        CHECK_INT(llmcb_op_wait(task), LLMCB_OK);
        CHECK(llmcb_op_done(x.op));
        CHECK(x.waits <= 2);
        CHECK_STR(x.all, "");
        llmcb_op_free(x.op);
        llmcb_op_free(task);
        scene_close(&s);
    }
}

/* Freeing the op ends the await of its reader as a cancel does: the reader
 * must learn that there is no op to read from. */
TEST(freeing_the_op_ends_its_readers_await)
{
    scene s;
    llmcb_op *task;
    reader x;

    memset(&x, 0, sizeof x);
    x.stop_waiting = true;
    scene_init(&s);
    s.fed = true;
    scene_open(&s);
    x.op = scene_stream(&s);
    task = llmcb_task_start(s.loop, read_chunks, 0, &x);
    turns(&s, 3);
    CHECK(!llmcb_op_done(task));
    llmcb_op_free(x.op);
    CHECK_INT(llmcb_op_wait(task), LLMCB_ECANCELLED);
    CHECK_INT(x.waits, 1);
    llmcb_op_free(task);
    scene_close(&s);
}

/* One reader at a time; a cancelled reader can begin again. */
TEST(one_reader_at_a_time)
{
    scene s;
    llmcb_op *task, *second;
    reader x, y;

    memset(&x, 0, sizeof x);
    memset(&y, 0, sizeof y);
    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a|b" DONE, 10, LLMCB_REPLAY_KEEP);
    scene_open(&s);
    x.op = y.op = scene_stream(&s);
    task = llmcb_task_start(s.loop, read_chunks, 0, &x);
    second = llmcb_task_start(s.loop, read_chunks, 0, &y);
    CHECK_INT(llmcb_op_wait(second), LLMCB_EBUSY);
    llmcb_op_cancel(task);
    CHECK_INT(llmcb_op_wait(task), LLMCB_ECANCELLED);
    llmcb_op_free(second);
    second = llmcb_task_start(s.loop, read_chunks, 0, &y);
    CHECK_INT(llmcb_op_wait(second), LLMCB_OK);
    CHECK_STR(y.all, "a,b,,");
    llmcb_op_free(task);
    llmcb_op_free(second);
    llmcb_op_free(x.op);
    scene_close(&s);
}

/* Inside a callback op_next does not wait. */
static int act_next(rec *r, const llmcb_event *ev)
{
    own_op *o = (own_op *)r->user;
    const llmcb_chunk *chunk = (const llmcb_chunk *)1;

    if (!llmcb_op_next(o->op, &chunk)) CHECK(!chunk);
    else note("pulled:%s", chunk->text.ptr);
    (void)ev;
    return 0;
}

TEST(op_next_inside_a_callback_does_not_wait)
{
    scene s;
    rec *r = rec_new("I", INLINE);
    own_op o;

    memset(&o, 0, sizeof o);
    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a|b|c" DONE, 10, LLMCB_REPLAY_KEEP);
    scene_add(&s, r);
    r->act = act_next;
    r->user = &o;
    scene_open(&s);
    o.op = scene_stream(&s);
    turn_to_end(&s);
    /* the chunk of its own event is not there yet, that of the one before
     * is, if it has not been read */
    CHECK(before("I<b", "pulled:a"));
    CHECK(before("I<c", "pulled:b"));
    CHECK(!noted("I<a pulled"));
    CHECK_REC(r);
    llmcb_op_free(o.op);
    scene_close(&s);
    free(r);
}

/* Two chunks of an event, an empty log and no handler at all. */
TEST(pull_without_handlers)
{
    unsigned w;

    for (w = 1; w <= 8; w++) {
        scene s;
        const llmcb_chunk *chunk;
        llmcb_op *op;
        char all[64] = "";

        scene_init(&s);
        scene_tape(&s, OK_HEAD, pairs, w % 2 ? 0 : 3, LLMCB_REPLAY_KEEP);
        s.cd.limits.window_events = w;
        s.cd.n = 2;
        scene_open(&s);
        op = scene_stream(&s);
        while (llmcb_op_next(op, &chunk)) {
            CHECK(chunk->parts != NULL);
            sprintf(all + strlen(all), "%s%d", chunk->text.ptr,
                    chunk->choice);
        }
        CHECK_STR(all, "a0A1b0B1c0C1d0D110");
        CHECK_INT(llmcb_op_code(op), LLMCB_OK);
        llmcb_op_free(op);
        scene_close(&s);
    }
}

/* ======== everything at once ============================================== */

/* Calls of all kinds with handlers of all kinds that speak, fail, cancel and
 * free, without memory or time, in an order that only the seed decides:
 * whatever happens, no guarantee is broken, nothing hangs and nothing is
 * left. */
typedef struct chaos {
    scene s;
    uint32_t seed, state;
    llmcb_op *ops[4];
    rec *r[6];
    size_t n_ops, n_recs;
    bool quiet; /* handlers do nothing but listen */
} chaos;

static uint32_t chaos_mix(uint32_t x)
{
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x *= 0x846CA68Bu;
    return x ^ x >> 16;
}

static uint32_t chaos_below(chaos *c, uint32_t n)
{
    c->state = chaos_mix(c->state + 0x9E3779B9u);
    return c->state % n;
}

/* Which is decided by the event alone, since workers come at any time. */
static int act_chaos(rec *r, const llmcb_event *ev)
{
    chaos *c = (chaos *)r->user;
    uint32_t dice = chaos_mix(c->seed + (uint32_t)ev->seq * 977 +
                              (uint32_t)(unsigned char)*r->name * 31);
    bool loop = pthread_equal(c->s.loop->thread, pthread_self()) != 0;
    size_t i = dice / 64 % c->n_ops;
    llmcb_code code = LLMCB_OK;

    if (c->quiet) return 0;
    switch (dice % 64) {
    case 0:
    case 1:
    case 2:
    case 3:
        if (ev->kind == LLMCB_TEXT) break;
        code = llmcb_run_text(ev->run, str("t"));
        break;
    case 4:
        return FAILED;
    case 5:
        if (loop) llmcb_op_cancel(c->ops[i]);
        break;
    case 6:
        if (!loop) break;
        llmcb_op_free(c->ops[i]);
        c->ops[i] = NULL;
        break;
    default:
        break;
    }
    CHECK(code == LLMCB_OK || code == LLMCB_EBUSY || code == LLMCB_ESTATE ||
          (code == LLMCB_ENOMEM && c->s.heap.fail_at));
    return 0;
}

static void chaos_handlers(chaos *c)
{
    static const char *const names[] = { "a", "b", "c", "d", "e", "f" };
    size_t i;

    c->n_recs = 1 + chaos_below(c, 6);
    for (i = 0; i < c->n_recs; i++) {
        rec *r = rec_new(names[i], (mode)chaos_below(c, N_MODES));
        if (!chaos_below(c, 3)) r->h.flags |= LLMCB_AWAIT_EACH;
        if (!chaos_below(c, 3)) r->h.flags |= LLMCB_PARALLEL;
        if (!chaos_below(c, 3)) r->h.flags |= LLMCB_RAISE;
        r->ms = chaos_below(c, 2) * chaos_below(c, 12);
        r->h.frame_size = chaos_below(c, 100);
        r->act = act_chaos;
        r->user = c;
        c->r[i] = r;
        scene_add(&c->s, r);
    }
}

static void chaos_tapes(chaos *c)
{
    scene *s = &c->s;
    size_t i;

    for (i = 0; i < 8; i++) {
        int64_t gap = chaos_below(c, 2) * chaos_below(c, 9);
        switch (chaos_below(c, 8)) {
        case 0:
            scene_tape(s, RETRY_HEAD, "", 0, LLMCB_REPLAY_KEEP);
            break;
        case 1:
            scene_tape(s, BAD_HEAD, "", 0, LLMCB_REPLAY_CLOSE);
            break;
        case 2:
            scene_tape(s, OK_HEAD, "a|b|c", gap, LLMCB_REPLAY_CLOSE);
            break;
        case 3:
            scene_tape(s, OK_HEAD, "a|b", gap, LLMCB_REPLAY_RESET);
            break;
        case 4:
            scene_tape(s, OK_HEAD, pairs, gap, LLMCB_REPLAY_KEEP);
            break;
        default:
            scene_tape(s, OK_HEAD, "a|b|c|d|e|f|g|h|i" DONE, gap,
                       LLMCB_REPLAY_KEEP);
            break;
        }
    }
}

static void chaos_run(uint32_t seed)
{
    chaos *c = (chaos *)calloc(1, sizeof *c);
    const llmcb_chunk *chunk;
    llmcb_config config;
    size_t i, steps;

    if (!c) abort();
    memset(&config, 0, sizeof config);
    c->seed = c->state = seed;
    scene_init(&c->s);
    c->quiet = !chaos_below(c, 3);
    c->s.ld.workers = 2 + chaos_below(c, 4);
    c->s.cd.limits.window_events = chaos_below(c, 2) ? 0
                                                     : 1 + chaos_below(c, 8);
    if (!chaos_below(c, 4)) c->s.cd.limits.window_bytes = 1500;
    if (!chaos_below(c, 4)) c->s.cd.handler_ms = 5;
    if (!chaos_below(c, 4)) c->s.cd.total_ms = 1 + chaos_below(c, 60);
    chaos_handlers(c);
    chaos_tapes(c);
    c->n_ops = 1 + chaos_below(c, 4);
    config.max_concurrency = chaos_below(c, 3);
    if (!chaos_below(c, 4)) {
        c->s.heap.fail_at = 20 + chaos_below(c, 400);
        c->s.heap.for_ever = chaos_below(c, 2);
    }
    if (!scene_open(&c->s)) c->n_ops = 0;
    for (i = 0; i < c->n_ops; i++)
        c->ops[i] = chaos_below(c, 3)
                        ? call_batch(&c->s, 1 + chaos_below(c, 3), &config)
                        : scene_stream(&c->s);
    for (steps = c->n_ops ? chaos_below(c, 60) : 0; steps; steps--) {
        i = chaos_below(c, (uint32_t)c->n_ops);
        switch (chaos_below(c, 24)) {
        case 0:
            llmcb_op_cancel(c->ops[i]);
            break;
        case 1:
            llmcb_op_free(c->ops[i]);
            c->ops[i] = NULL;
            break;
        case 2:
        case 3:
            llmcb_run_text(llmcb_op_run_at(c->ops[i], 0), str("p"));
            break;
        case 4:
        case 5:
        case 6:
            llmcb_op_next(c->ops[i], &chunk);
            break;
        default:
            turns(&c->s, 1);
            break;
        }
    }
    if (chaos_below(c, 4)) /* else the loop is freed under way */
        for (i = 0; i < c->n_ops; i++) {
            llmcb_op_wait(c->ops[i]);
            if (chaos_below(c, 2)) continue;
            llmcb_op_free(c->ops[i]);
            c->ops[i] = NULL;
        }
    scene_close(&c->s);
    for (i = 0; i < c->n_recs; i++) {
        rec *r = c->r[i];
        if (c->s.cd.handler_ms && r->finishes < r->starts)
            r->finishes = r->starts; /* it may have been given up */
        CHECK_REC(r);
        if (!(r->h.flags & LLMCB_PARALLEL) && r->h.sync.on_llm_end &&
            r->h.sync.on_llm_new_token)
            CHECK(r->peak <= 1);
        free(r);
    }
    free(c);
    if (test_failures_here) printf("  seed %u\n", (unsigned)seed);
}

/* TEST_SEED=n plays one seed, TEST_SEEDS=n as many as that. */
TEST(everything_at_once)
{
    const char *one = getenv("TEST_SEED"), *many = getenv("TEST_SEEDS");
    uint32_t seed = one ? (uint32_t)strtoul(one, NULL, 10) : 1;
    uint32_t last = one    ? seed
                    : many ? (uint32_t)strtoul(many, NULL, 10)
                           : 400;

    for (; seed <= last && !test_failures_here; seed++) chaos_run(seed);
}

int main(int argc, char **argv)
{
    return scene_main(argc, argv);
}

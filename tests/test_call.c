/* Handlers, cursors and dispatch: defects that were found, whose tests stay,
 * and the first tests of the guarantees in the header's first comment.
 * test_run.c has the rest. */
#include "scene.h"

/* ======== defects that were found; their tests stay ======================= */

/* An act: keeps at the gate, then reads the start's payload again. */
static int act_read_start(rec *r, const llmcb_event *ev)
{
    (void)r;
    if (is_start(ev->kind)) {
        CHECK_STR(ev->start->prompt.ptr, "Human: hi");
        CHECK_STR(ev->start->messages[0].content, "hi");
    }
    return 0;
}

static int act_raise_start(rec *r, const llmcb_event *ev)
{
    (void)r;
    return is_start(ev->kind) ? -77 : 0;
}

/* The payload is valid until the handler is done with that event, also when
 * the call is cancelled meanwhile. */
TEST(start_payload_outlives_a_cancel)
{
    mode m;

    for (m = SYNC; m <= ASYNC; m++) {
        gate g = GATE;
        scene s;
        rec *r = rec_new(mode_names[m], m);
        llmcb_op *op;
        scene_init(&s);
        scene_tape(&s, OK_HEAD, "a" DONE, 0, LLMCB_REPLAY_CLOSE);
        scene_add(&s, r);
        r->act = act_read_start;
        r->gate = &g;
        r->gate_kind = LLMCB_CHAT_MODEL_START;
        r->ms = 300;
        scene_open(&s);
        op = scene_call(&s);
        if (m == SYNC) turn_to_gate(&s, &g, 1);
        else turns(&s, 1);
        llmcb_op_cancel(op);
        turns(&s, 2);
        gate_let(&g, ALL);
        CHECK_INT(llmcb_op_wait(op), LLMCB_ECANCELLED);
        CHECK_STR(r->log, "start|error:ECANCELLED");
        CHECK_REC(r);
        CHECK_INT(s.spy.requests, 0);
        llmcb_op_free(op);
        scene_close(&s);
        free(r);
    }
}

/* ... and when another start handler has raised. */
TEST(start_payload_outlives_a_raise)
{
    gate g = GATE;
    scene s;
    rec *slow = rec_new("S", SYNC), *bad = rec_new("I", INLINE);
    llmcb_op *op;

    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a" DONE, 0, LLMCB_REPLAY_CLOSE);
    scene_add(&s, slow);
    scene_add(&s, bad);
    slow->act = act_read_start;
    slow->gate = &g;
    slow->gate_kind = LLMCB_CHAT_MODEL_START;
    bad->act = act_raise_start;
    bad->h.flags |= LLMCB_RAISE;
    scene_open(&s);
    op = scene_call(&s);
    turn_to_gate(&s, &g, 1);
    turns(&s, 3);
    gate_let(&g, ALL);
    CHECK_INT(llmcb_op_wait(op), LLMCB_EHANDLER);
    CHECK_INT(llmcb_op_error(op)->handler_result, -77);
    CHECK_STR(slow->log, "start|error:EHANDLER");
    CHECK_STR(bad->log, "start|error:EHANDLER");
    CHECK_INT(s.spy.requests, 0);
    llmcb_op_free(op);
    scene_close(&s);
    free(slow);
    free(bad);
}

/* The first and the second fail otherwise. */
static int act_fail_token(rec *r, const llmcb_event *ev)
{
    if (ev->kind != LLMCB_LLM_NEW_TOKEN) return 0;
    return *r->name == 'f' ? -11 : -22;
}

/* Two have raised at one event before the loop looks, one after the other: the
 * call's error is that of the first. All wait for the same worker, so that the
 * last one's coming says that both have failed. */
TEST(of_two_that_raise_in_one_turn_the_first_counts)
{
    gate g = GATE;
    scene s;
    rec *r[3];
    llmcb_op *op;
    int i;

    scene_init(&s);
    s.ld.workers = 2;
    s.fed = true;
    r[0] = rec_new("first", SYNC);
    r[1] = rec_new("second", SYNC);
    r[2] = rec_new("behind", SYNC);
    for (i = 0; i < 2; i++) {
        r[i]->act = act_fail_token;
        r[i]->h.flags |= LLMCB_RAISE;
    }
    r[2]->gate = &g;
    r[2]->gate_kind = LLMCB_LLM_NEW_TOKEN;
    for (i = 0; i < 3; i++) scene_add(&s, r[i]);
    scene_open(&s);
    op = scene_call(&s);
    turn_to_request(&s, 1);
    feed_head(&s);
    feed_events(&s, "a");
    gate_wait(&g, 1);
    turns(&s, 1);
    gate_let(&g, ALL);
    CHECK_INT(llmcb_op_wait(op), LLMCB_EHANDLER);
    CHECK_INT(llmcb_op_error(op)->handler_result, -11);
    CHECK(strstr(llmcb_op_error(op)->message, "first"));
    CHECK(!strstr(llmcb_op_error(op)->message, "second"));
    for (i = 0; i < 3; i++) {
        CHECK_STR(r[i]->log, "start|a|error:EHANDLER");
        CHECK_REC(r[i]);
    }
    llmcb_op_free(op);
    scene_close(&s);
    for (i = 0; i < 3; i++) free(r[i]);
}

/* A worker's last news and a cancel in the same turn: the cursor must not be
 * told of again after its run is gone. `behind` waits for the same worker, so
 * its coming says that the other's news have been left. */
TEST(cancel_in_the_turn_of_the_last_news)
{
    gate g = GATE, g2 = GATE;
    scene s;
    rec *r = rec_new("S", SYNC), *behind = rec_new("B", SYNC);
    llmcb_op *op, *other;

    scene_init(&s);
    s.ld.workers = 2;
    s.fed = true;
    r->gate = &g;
    r->h.sync.on_llm_error = NULL; /* the finish needs no worker */
    r->gate_kind = LLMCB_LLM_NEW_TOKEN;
    behind->gate = &g2;
    scene_open(&s);
    op = scene_call_with(&s, r);
    turn_to_request(&s, 1);
    feed_head(&s);
    feed_events(&s, "a");
    turn_to_gate(&s, &g, 1);
    other = scene_call_with(&s, behind);
    turns(&s, 3);
    llmcb_op_cancel(op);
    gate_let(&g, ALL);
    gate_wait(&g2, 1);
    turns(&s, 1);
    CHECK(llmcb_op_done(op));
    CHECK_INT(llmcb_op_code(op), LLMCB_ECANCELLED);
    llmcb_op_free(op);
    turns(&s, 3);
    llmcb_op_free(other);
    gate_let(&g2, ALL);
    scene_close(&s);
    CHECK_STR(r->log, "start|a");
    free(r);
    free(behind);
}

/* A worker's last news arrive while the turn runs in which they become what
 * the loop waits for: the loop must not go to sleep on them. */
TEST(news_in_the_turn_of_the_drain_wake_the_loop)
{
    gate g = GATE, g2 = GATE;
    scene s;
    rec *r = rec_new("S", SYNC), *behind = rec_new("B", SYNC);
    llmcb_op *op, *other;
    feed *f;
    int64_t ms = -2;

    scene_init(&s);
    s.ld.workers = 2;
    s.ld.virtual_clock = false; /* which would look more often */
    s.fed = true;
    r->gate = &g;
    r->gate_kind = LLMCB_LLM_NEW_TOKEN;
    behind->gate = &g2;
    scene_open(&s);
    op = scene_call_with(&s, r);
    turn_to_request(&s, 1);
    feed_head(&s);
    feed_events(&s, "a");
    turn_to_gate(&s, &g, 1);
    other = scene_call_with(&s, behind);
    turns(&s, 3);
    f = feed_new(&s, "[DONE]");
    f->let = &g;
    f->until = &g2;
    f->until_n = 1;
    llmcb_loop_post(s.loop, feed_arrive, f);
    turns(&s, 1);
    CHECK_INT(llmcb_loop_prepare(s.loop, &ms), LLMCB_OK);
    CHECK_INT(ms, 0);
    turns(&s, 3);
    llmcb_op_free(other);
    gate_let(&g2, ALL);
    while (!llmcb_op_done(op)) turns(&s, 1);
    CHECK_INT(llmcb_op_code(op), LLMCB_OK);
    CHECK_STR(r->log, "start|a|end");
    llmcb_op_free(op);
    scene_close(&s);
    free(r);
    free(behind);
}

/* The window is full of the program's own events when bytes come: what makes
 * room must be heard all the same. */
TEST(a_pause_without_an_event_is_ended)
{
    gate g = GATE, g2 = GATE;
    scene s;
    rec *r = rec_new("S", SYNC), *behind = rec_new("B", SYNC);
    llmcb_op *op, *other;
    llmcb_str text = { "x", 1 };
    int64_t ms = -2;
    int i;

    scene_init(&s);
    s.ld.workers = 2;
    s.ld.virtual_clock = false;
    s.cd.limits.window_events = 4;
    s.fed = true;
    r->gate = &g;
    r->gate_kind = LLMCB_TEXT;
    behind->gate = &g2;
    scene_open(&s);
    op = scene_call_with(&s, r);
    turn_to_request(&s, 1);
    feed_head(&s);
    for (i = 0; i < 4; i++)
        CHECK_INT(llmcb_run_text(llmcb_op_run_at(op, 0), text), LLMCB_OK);
    CHECK_INT(llmcb_run_text(llmcb_op_run_at(op, 0), text), LLMCB_EBUSY);
    turn_to_gate(&s, &g, 1);
    feed_events(&s, "a|b");
    other = scene_call_with(&s, behind);
    turns(&s, 3);
    gate_let(&g, ALL);
    gate_wait(&g2, 1);
    CHECK_INT(llmcb_loop_prepare(s.loop, &ms), LLMCB_OK);
    CHECK_INT(ms, 0);
    llmcb_op_free(other);
    gate_let(&g2, ALL);
    feed_events(&s, "$|[DONE]");
    while (!llmcb_op_done(op)) turns(&s, 1);
    CHECK_STR(r->log, "start|text:x|text:x|text:x|text:x|a|b||end");
    llmcb_op_free(op);
    scene_close(&s);
    free(r);
    free(behind);
}

/* A handler that was given up gets nothing more of this run. */
TEST(given_up_handler_gets_nothing_more)
{
    gate g = GATE;
    scene s;
    rec *r = rec_new("S", SYNC), *a = rec_new("A", ASYNC);
    llmcb_op *op;

    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a|b|c" DONE, 0, LLMCB_REPLAY_CLOSE);
    scene_add(&s, r);
    scene_add(&s, a);
    s.cd.handler_ms = 100;
    r->gate = &g;
    r->gate_kind = LLMCB_LLM_NEW_TOKEN;
    scene_open(&s);
    op = scene_call(&s);
    turn_to_gate(&s, &g, 1);
    turns(&s, 5);
    llmcb_clock_advance(s.loop, 99);
    turns(&s, 2);
    CHECK(!llmcb_op_done(op));
    llmcb_clock_advance(s.loop, 1);
    turns(&s, 2);
    CHECK(llmcb_op_done(op));
    CHECK_INT(llmcb_op_code(op), LLMCB_ETIMEDOUT);
    CHECK_INT(llmcb_op_error(op)->detail, LLMCB_DETAIL_HANDLER);
    gate_let(&g, ALL);
    llmcb_op_free(op);
    scene_close(&s);
    CHECK_STR(r->log, "start|a");
    CHECK_STR(a->log, "start|a|b|c||error:ETIMEDOUT");
    CHECK_REC(a);
    free(r);
    free(a);
}

/* handler_ms is for one event: a handler that takes less for each is fine,
 * however many wait. */
TEST(patience_is_for_one_event)
{
    gate g = GATE;
    scene s;
    rec *r = rec_new("S", SYNC);
    llmcb_op *op;
    unsigned i;

    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a|b|c|d|e|f" DONE, 0, LLMCB_REPLAY_CLOSE);
    scene_add(&s, r);
    s.cd.handler_ms = 100;
    r->gate = &g;
    r->gate_kind = LLMCB_LLM_NEW_TOKEN;
    scene_open(&s);
    op = scene_call(&s);
    turn_to_gate(&s, &g, 1);
    turns(&s, 5);
    for (i = 1; i <= 7; i++) { /* seven tokens, of 60 ms each */
        gate_wait(&g, i);
        turns(&s, 2);
        llmcb_clock_advance(s.loop, 60);
        turns(&s, 2);
        gate_let(&g, 1);
    }
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    llmcb_op_free(op);
    scene_close(&s);
    CHECK_STR(r->log, "start|a|b|c|d|e|f||end");
    CHECK_REC(r);
    free(r);
}

/* An act of a coroutine that waits long in the first token. */
static int64_t stuck_ms(const rec *r)
{
    return r->user ? 1000000 : 0;
}

static llmcb_step stuck_token(llmcb_task *t, llmcb_handler *h,
                              const llmcb_event *ev)
{
    rec *r = (rec *)(void *)h;

    LLMCB_BEGIN(t);
    rec_enter(r, ev);
    LLMCB_AWAIT(t, llmcb_sleep(t, stuck_ms(r)));
    if (t->result == LLMCB_ECANCELLED) r->cancelled++;
    return rec_leave(r, ev);
    LLMCB_END(t);
}

/* Only the handler that takes too long is given up. The other one has more
 * to do than handler_ms in all, but not for one event. */
TEST(only_the_stuck_handler_is_given_up)
{
    scene s;
    rec *stuck = rec_new("A", ASYNC), *slow = rec_new("B", ASYNC);
    llmcb_op *op;

    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a|b|c|d|e|f" DONE, 0, LLMCB_REPLAY_CLOSE);
    scene_add(&s, stuck);
    scene_add(&s, slow);
    s.cd.handler_ms = 100;
    stuck->h.async.on_llm_new_token = stuck_token;
    stuck->user = stuck;
    slow->ms = 60;
    scene_open(&s);
    op = scene_call(&s);
    CHECK_INT(llmcb_op_wait(op), LLMCB_ETIMEDOUT);
    CHECK_STR(stuck->log, "start|a");
    CHECK_INT(stuck->cancelled, 1);
    CHECK_STR(slow->log, "start|a|b|c|d|e|f||error:ETIMEDOUT");
    CHECK_REC(slow);
    llmcb_op_free(op);
    scene_close(&s);
    free(stuck);
    free(slow);
}

/* Free is legal inside every callback; what is in use is destroyed later. */
static llmcb_step free_own_op(llmcb_task *t, llmcb_handler *h,
                              const llmcb_event *ev)
{
    rec *r = (rec *)(void *)h;

    (void)ev;
    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_sleep(t, 1000000)); /* is given up */
    LLMCB_AWAIT(t, llmcb_sleep(t, 50));      /* takes its time even so */
    CHECK(llmcb_op_done(*(llmcb_op **)r->user));
    llmcb_op_free(*(llmcb_op **)r->user);
    *(llmcb_op **)r->user = NULL;
    LLMCB_END(t);
}

TEST(given_up_coroutine_frees_its_op)
{
    scene s;
    rec *r = rec_new("A", ASYNC);
    llmcb_op *op;
    int i;

    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a" DONE, 0, LLMCB_REPLAY_CLOSE);
    scene_add(&s, r);
    s.cd.handler_ms = 100;
    r->h.async.on_llm_new_token = free_own_op;
    r->user = &op;
    scene_open(&s);
    op = scene_call(&s);
    CHECK_INT(llmcb_op_wait(op), LLMCB_ETIMEDOUT);
    for (i = 0; i < 100 && op; i++) turns(&s, 1);
    CHECK(!op);
    llmcb_op_free(op);
    scene_close(&s);
    free(r);
}

static int act_count_usage(rec *r, const llmcb_event *ev)
{
    if (ev->token && ev->token->parts->usage.known) ++*(int *)r->user;
    return 0;
}

/* An event with two choices and the usage, of which the second choice must
 * wait for room: the usage is told once all the same. */
TEST(usage_is_told_once_when_a_choice_waits)
{
    scene s;
    rec *r = rec_new("A", ASYNC);
    llmcb_op *op;
    int usages = 0;

    scene_init(&s);
    scene_tape(&s, OK_HEAD,
               "{\"choices\":[{\"index\":0,\"delta\":{\"content\":\"x\"},"
               "\"finish_reason\":\"stop\"},{\"index\":1,\"delta\":"
               "{\"content\":\"y\"},\"finish_reason\":\"stop\"}],\"usage\":"
               "{\"prompt_tokens\":1,\"completion_tokens\":2}}|[DONE]",
               0, LLMCB_REPLAY_CLOSE);
    scene_add(&s, r);
    s.cd.n = 2;
    s.cd.limits.window_events = 1;
    r->act = act_count_usage;
    r->user = &usages;
    r->ms = 5;
    scene_open(&s);
    op = scene_call(&s);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_STR(r->log, "start|x|y|end");
    CHECK_INT(usages, 1);
    llmcb_op_free(op);
    scene_close(&s);
    free(r);
}

static llmcb_step wait_for_pipe(llmcb_task *t, llmcb_handler *h,
                                const llmcb_event *ev)
{
    rec *r = (rec *)(void *)h;

    LLMCB_BEGIN(t);
    rec_enter(r, ev);
    LLMCB_AWAIT(t, llmcb_await_fd(t, *(int *)r->user, LLMCB_READ,
                                  LLMCB_FOREVER));
    if (t->result == LLMCB_ECANCELLED) r->cancelled++;
    return rec_leave(r, ev);
    LLMCB_END(t);
}

/* Freeing the loop ends every await, also one that was begun in an end
 * handler: only a blocking function may make it late. */
TEST(loop_free_ends_the_await_of_an_end_handler)
{
    scene s;
    rec *r = rec_new("A", ASYNC);
    int fd[2];

    REQUIRE(pipe(fd) == 0);
    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a" DONE, 0, LLMCB_REPLAY_CLOSE);
    scene_add(&s, r);
    s.ld.shutdown_ms = 300; /* only if it fails */
    r->h.async.on_llm_end = wait_for_pipe;
    r->user = &fd[0];
    scene_open(&s);
    scene_call(&s);
    while (!strstr(trace, "A<end")) turns(&s, 1);
    turns(&s, 2);
    scene_close(&s);
    CHECK_INT(r->cancelled, 1);
    CHECK_REC(r);
    free(r);
    close(fd[0]);
    close(fd[1]);
}

/* More events than a worker takes at a time, of many runs at once: the
 * loop's list of cursors with news must stay whole. TSan looks on. */
TEST(many_runs_with_many_events_on_the_pool)
{
    enum { RUNS = 20, TOKENS = 200 };
    scene s;
    rec *r = rec_new("S", SYNC), *p = rec_new("P", SYNC);
    llmcb_op *ops[RUNS];
    char *pieces = (char *)malloc(TOKENS * 8 + 64), *at = pieces;
    int i;

    REQUIRE(pieces != NULL);
    for (i = 0; i < TOKENS; i++) at += sprintf(at, "t%d|", i);
    strcpy(at, "$|[DONE]");
    scene_init(&s);
    scene_tape(&s, OK_HEAD, pieces, 0, LLMCB_REPLAY_CLOSE);
    scene_add(&s, r);
    scene_add(&s, p);
    p->h.flags |= LLMCB_PARALLEL;
    scene_open(&s);
    for (i = 0; i < RUNS; i++) ops[i] = scene_call(&s);
    for (i = 0; i < RUNS; i++) {
        CHECK_INT(llmcb_op_wait(ops[i]), LLMCB_OK);
        llmcb_op_free(ops[i]);
    }
    CHECK_REC(r);
    CHECK_REC(p);
    CHECK_INT(r->finishes, RUNS);
    CHECK_INT(r->peak, 1);
    scene_close(&s);
    free(pieces);
    free(r);
    free(p);
}

/* ======== 2: start and finish are barriers ================================ */

/* The request leaves when all are done with the start, the end is told when
 * all are done with the tokens, and the op is done when all are done with the
 * end: whatever kind the slow handler is. */
TEST(start_and_finish_are_barriers)
{
    mode m;

    for (m = SYNC; m <= ASYNC_TOKENS; m++) {
        scene s;
        rec *slow = rec_new("slow", m), *fast = rec_new("fast", ASYNC);
        llmcb_op *op;
        scene_init(&s);
        scene_tape(&s, OK_HEAD, "a|b" DONE, 10, LLMCB_REPLAY_CLOSE);
        scene_add(&s, slow);
        scene_add(&s, fast);
        slow->ms = 300;
        scene_open(&s);
        op = scene_call(&s);
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        note("done");
        CHECK(before("slow>start", "request"));
        CHECK(before("fast>start", "request"));
        CHECK(before("request", "slow<a"));
        CHECK(before("slow>b", "fast<end"));
        CHECK(before("slow>b", "slow<end"));
        CHECK(before("slow>end", "done"));
        CHECK_STR(slow->log, "start|a|b||end");
        CHECK_STR(fast->log, "start|a|b||end");
        CHECK_REC(slow);
        CHECK_REC(fast);
        llmcb_op_free(op);
        scene_close(&s);
        free(slow);
        free(fast);
    }
}

/* Their requests go in the order of the calls, whoever was told of them first:
 * the n-th call gets the n-th recording. */
static void calls_in_order(int way, bool two)
{
    enum { AT_ONCE, TURN_BY_TURN, WHILE_BUSY, A_BATCH, N = 12 };
    scene s;
    gate g = GATE;
    rec *r[2] = { rec_new("S", SYNC), rec_new("other", SYNC) };
    llmcb_message m;
    llmcb_prompt prompts[N];
    llmcb_op *ops[N] = { NULL };
    char text[16];
    size_t i;

    scene_init(&s);
    memset(&m, 0, sizeof m);
    m.content = "hi";
    for (i = 0; i < N; i++) {
        sprintf(text, "t%u" DONE, (unsigned)i);
        scene_tape(&s, OK_HEAD, text, 0, LLMCB_REPLAY_CLOSE);
        prompts[i].messages = &m;
        prompts[i].n = 1;
    }
    r[0]->gate = &g;
    if (way != WHILE_BUSY) gate_let(&g, ALL);
    scene_add(&s, r[0]);
    if (two) scene_add(&s, r[1]);
    scene_open(&s);
    if (way == A_BATCH)
        ops[0] = llmcb_chat_batch(s.chat, prompts, N, NULL);
    for (i = 0; i < N && way != A_BATCH; i++) {
        ops[i] = scene_call(&s);
        if (way == TURN_BY_TURN) turns(&s, 1);
        if (way == WHILE_BUSY && i == 0) turn_to_gate(&s, &g, 1);
    }
    gate_let(&g, ALL);
    for (i = 0; i < N; i++) {
        const llmcb_op *op = way == A_BATCH ? ops[0] : ops[i];
        const llmcb_result *result;
        if (ops[i]) CHECK_INT(llmcb_op_wait(ops[i]), LLMCB_OK);
        result = way == A_BATCH ? llmcb_op_result_at(op, i)
                                : llmcb_op_result(op);
        sprintf(text, "t%u", (unsigned)i);
        CHECK_STR(result->generations[0].text.ptr, text);
    }
    for (i = 0; i < N; i++) llmcb_op_free(ops[i]);
    CHECK_REC(r[0]);
    CHECK_REC(r[1]);
    scene_close(&s);
    free(r[0]);
    free(r[1]);
}

TEST(requests_go_in_the_order_of_the_calls)
{
    int way;

    for (way = 0; way < 4; way++) {
        calls_in_order(way, false);
        calls_in_order(way, true); /* on threads of their own */
    }
}

/* ======== 6: exactly one finish, also without memory ====================== */

/* The i-th allocation fails, once or with all after it. false: the call has
 * not got as far as that. */
static bool without_memory(long i, bool for_ever)
{
    scene s;
    rec *r[3];
    llmcb_op *op;
    llmcb_code code = LLMCB_ENOMEM;
    bool reached;
    size_t k;

    scene_init(&s);
    scene_tape(&s, OK_HEAD,
               "Why|{\"id\":\"x\",\"model\":\"m\",\"choices\":[{\"index\":0,"
               "\"delta\":{\"content\":\"\\u00e9\",\"tool_calls\":[{\"index\":"
               "0,\"id\":\"t\",\"function\":{\"name\":\"f\",\"arguments\":"
               "\"{}\"}}]}}]}| don|'t" DONE, 10, LLMCB_REPLAY_CLOSE);
    for (k = 0; k < 3; k++) {
        r[k] = rec_new(mode_names[k], (mode)k);
        scene_add(&s, r[k]);
    }
    r[ASYNC]->ms = 5;
    r[ASYNC]->h.frame_size = 100;
    s.heap.fail_at = i;
    s.heap.for_ever = for_ever;
    if (scene_open(&s)) {
        op = scene_call(&s);
        code = llmcb_op_wait(op);
        for (k = 0; k < 3; k++) CHECK_REC(r[k]);
        llmcb_op_free(op);
    }
    reached = s.heap.calls >= i;
    if (code != LLMCB_OK && code != LLMCB_ENOMEM)
        TEST_FAIL("allocation %ld%s: %s", i, for_ever ? " and on" : "",
                  llmcb_code_name(code));
    if (!reached) CHECK_INT(code, LLMCB_OK);
    s.heap.fail_at = 0;
    if (s.loop && s.chat) { /* it can be used again */
        op = scene_call(&s);
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        for (k = 0; k < 3; k++) CHECK_REC(r[k]);
        llmcb_op_free(op);
    }
    scene_close(&s);
    for (k = 0; k < 3; k++) free(r[k]);
    if (test_failures_here) printf("  at allocation %ld\n", i);
    return reached && !test_failures_here;
}

TEST(out_of_memory_once)
{
    long i = 1;

    while (without_memory(i, false)) i++;
    CHECK(i > 30); /* or it was not tested */
}

TEST(out_of_memory_for_ever)
{
    long i = 1;

    while (without_memory(i, true)) i++;
    CHECK(i > 30);
}

/* ======== the pull interface ============================================== */

TEST(pull_reads_every_chunk_behind_the_handlers)
{
    scene s;
    rec *r = rec_new("A", ASYNC);
    llmcb_op *op;
    const llmcb_chunk *chunk;

    scene_init(&s);
    scene_tape(&s, OK_HEAD, "a|b|c" DONE, 10, LLMCB_REPLAY_CLOSE);
    scene_add(&s, r);
    r->ms = 300;
    scene_open(&s);
    op = scene_stream(&s);
    while (llmcb_op_next(op, &chunk)) note("pulled:%s", chunk->text.ptr);
    CHECK(chunk == NULL);
    CHECK(llmcb_op_done(op));
    CHECK_INT(llmcb_op_code(op), LLMCB_OK);
    CHECK(before("A>a", "pulled:a"));
    CHECK(before("A>b", "pulled:b"));
    CHECK(before("A>c", "pulled:c"));
    CHECK(before("pulled:a", "A>c")); /* not only at the end */
    CHECK_INT(count_of(trace, "pulled:"), 4);
    CHECK(!llmcb_op_next(op, &chunk));
    CHECK_STR(r->log, "start|a|b|c||end");
    CHECK_REC(r);
    llmcb_op_free(op);
    scene_close(&s);
    free(r);
}

int main(int argc, char **argv)
{
    return scene_main(argc, argv);
}

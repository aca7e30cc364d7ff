/* Callbacks that call the library back: from the log, inside a transport's
 * functions, from a handler that feeds an exchange; and the end of a loop with
 * coroutines and threads that are not done. */
/* build: -DLLMCB_NO_CURL -DLLMCB_NO_EPOLL -DLLMCB_NO_SOCKETS -DLLMCB_NO_AGENT */
#include "sys.h"
#include "scene.h"

/* ======== what the tests have in common =================================== */

/* A scene that the test feeds, on a clock that only the test moves. */
static void begin(scene *s)
{
    scene_init(s);
    s->fed = true;
    s->ld.shutdown_ms = 50;
    s->cd.max_retries = -1;
    sys.still = true;
    sys.mono_ms = 0;
}

static void add(scene *s, llmcb_handler *h)
{
    s->handlers[s->n_handlers++] = h;
}

/* A call whose response has begun. */
static llmcb_op *call(scene *s)
{
    llmcb_op *op = scene_call(s);

    turn_to_request(s, s->spy.requests + 1);
    feed_head(s);
    return op;
}

/* What the server says next, from wherever the caller is. */
static void say(llmcb_exchange *x, const char *pieces)
{
    char bytes[4096];

    llmcb_exchange_data(x, bytes, events_text(bytes, pieces, NULL, NULL));
}

/* scene_close for a loop that something does not let go of. */
static void close_late(scene *s)
{
    llmcb_chat_free(s->chat);
    s->chat = NULL;
    CHECK_INT(llmcb_loop_free(s->loop), LLMCB_ETIMEDOUT);
    s->loop = NULL;
    scene_close(s);
}

/* Whether nothing runs or frees the loop here; asks no more after a no. */
static bool refused(llmcb_loop *loop, llmcb_op *op)
{
    return llmcb_loop_run_once(loop, 0) == LLMCB_ESTATE &&
           llmcb_op_wait(op) == LLMCB_ESTATE &&
           llmcb_loop_free(loop) == LLMCB_ESTATE;
}

/* A handler that is cancelled and then waits for something else; it fails. */
typedef struct late {
    llmcb_handler h; /* first */
    llmcb_op *op;    /* for this */
    int fd;          /* or for this, if not 0; or a while */
} late;

static llmcb_step late_step(llmcb_task *t, llmcb_handler *h,
                            const llmcb_event *ev)
{
    late *l = (late *)(void *)h;

    (void)ev;
    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_sleep(t, LLMCB_FOREVER));
    LLMCB_AWAIT(t, l->op   ? llmcb_await(t, l->op)
                   : l->fd ? llmcb_await_fd(t, l->fd, LLMCB_READ, LLMCB_FOREVER)
                           : llmcb_sleep(t, 100));
    return LLMCB_EIO;
    LLMCB_END(t);
}

/* The chat gives up on it. */
static void late_add(scene *s, late *l)
{
    memset(l, 0, sizeof *l);
    l->h.async.on_chat_model_start = late_step;
    s->cd.handler_ms = 30;
    add(s, &l->h);
}

/* A coroutine that no cancel ends. Time passes meanwhile. */
static llmcb_step stays(llmcb_task *t)
{
    sys.mono_ms += 10;
    return llmcb_sleep(t, 1);
}

static llmcb_step handler_stays(llmcb_task *t, llmcb_handler *h,
                                const llmcb_event *ev)
{
    (void)h;
    (void)ev;
    return stays(t);
}

/* ======== the log ========================================================= */

/* Frees the op that user points at once that is done. */
static void log_frees(void *user, const char *line)
{
    llmcb_op **op = (llmcb_op **)user, *it = *op;

    (void)line;
    if (!llmcb_op_done(it)) return;
    *op = NULL;
    llmcb_op_free(it);
}

static int act_fail(rec *r, const llmcb_event *ev)
{
    (void)r;
    (void)ev;
    return 7;
}

TEST(log_of_a_late_sync_handler_frees_its_op)
{
    gate g = GATE;
    scene s;
    rec *r = rec_new("S", SYNC);
    llmcb_op *op = NULL;

    begin(&s);
    s.ld.log = log_frees;
    s.ld.log_user = &op;
    s.cd.handler_ms = 30;
    r->gate = &g;
    r->act = act_fail;
    scene_add(&s, r);
    scene_open(&s);
    op = scene_call(&s);
    turn_to_gate(&s, &g, 1);
    llmcb_clock_advance(s.loop, 30);
    CHECK_INT(llmcb_op_wait(op), LLMCB_ETIMEDOUT);
    gate_let(&g, ALL);
    while (op)
        turns(&s, 1);
    turns(&s, 2);
    scene_close(&s);
    CHECK_STR(r->log, "start");
    free(r);
}

TEST(log_of_a_late_async_handler_frees_its_op)
{
    scene s;
    late l;
    llmcb_op *op = NULL;

    begin(&s);
    s.ld.log = log_frees;
    s.ld.log_user = &op;
    late_add(&s, &l);
    scene_open(&s);
    op = scene_call(&s);
    CHECK_INT(llmcb_op_wait(op), LLMCB_ETIMEDOUT);
    turns(&s, 5);
    CHECK(!op);
    llmcb_op_free(op);
    scene_close(&s);
}

/* ======== transports ====================================================== */

typedef struct stage {
    scene s; /* first */
    llmcb_op *op, *other;
    llmcb_exchange *x, *x_other;
    int done; /* how often it has asked, or fed */
    char text[64], text_other[64];
} stage;

/* With r, which does that at each event. */
static void begin_with(stage *st, rec *r,
                       int (*act)(rec *r, const llmcb_event *ev))
{
    memset(st, 0, sizeof *st);
    begin(&st->s);
    r->act = act;
    r->user = st;
    scene_add(&st->s, r);
}

static void free_asks(llmcb_transport *tr)
{
    /* the spy is within the scene, which is the first of the stage */
    stage *st = (stage *)(void *)((char *)tr - offsetof(scene, spy));

    CHECK(refused(st->s.loop, st->op));
    st->done++;
}

/* An op that is not done: what is would be an answer for llmcb_op_wait. */
TEST(loop_stands_still_inside_the_free_of_a_transport)
{
    stage st;

    memset(&st, 0, sizeof st);
    begin(&st.s);
    st.s.spy.base.free = free_asks;
    scene_open(&st.s);
    st.op = llmcb_task_start(st.s.loop, stays, 0, NULL);
    close_late(&st.s);
    CHECK_INT(st.done, 1);
}

static int act_ask(rec *r, const llmcb_event *ev)
{
    stage *st = (stage *)r->user;

    if (!ev->token || st->done) return 0; /* once is enough */
    CHECK(refused(st->s.loop, st->op));
    st->done++;
    return 0;
}

TEST(loop_stands_still_inside_a_handler_that_is_called_between_turns)
{
    stage st;
    rec *r = rec_new("I", INLINE);

    begin_with(&st, r, act_ask);
    scene_open(&st.s);
    st.op = call(&st.s);
    say(st.s.spy.fed, "a|b" DONE);
    CHECK_INT(llmcb_op_wait(st.op), LLMCB_OK);
    CHECK_INT(st.done, 1);
    CHECK_STR(r->log, "start|a|b||end");
    CHECK_REC(r);
    llmcb_op_free(st.op);
    scene_close(&st.s);
    free(r);
}

static void end_well_broken(void *arg)
{
    llmcb_exchange_end((llmcb_exchange *)arg, LLMCB_BROKEN, LLMCB_OK, 0, "x");
}

TEST(broken_for_no_reason_is_an_io_error)
{
    int begun;

    for (begun = 0; begun < 2; begun++) {
        scene s;
        rec *r = rec_new("I", INLINE);
        llmcb_op *op;
        begin(&s);
        scene_add(&s, r);
        scene_open(&s);
        op = scene_call(&s);
        turn_to_request(&s, 1);
        if (begun) {
            feed_head(&s);
            feed_events(&s, "a");
        }
        llmcb_loop_post(s.loop, end_well_broken, s.spy.fed);
        CHECK_INT(llmcb_op_wait(op), LLMCB_EIO);
        CHECK_STR(r->log, begun ? "start|a|error:EIO" : "start|error:EIO");
        llmcb_op_free(op);
        scene_close(&s);
        free(r);
    }
}

static void cancel_ends(llmcb_transport *tr, llmcb_exchange *x)
{
    spy_cancel(tr, x);
    llmcb_exchange_end(x, LLMCB_BROKEN, LLMCB_EIO, 0, "aborted");
}

/* ... alone, and behind a recorder. */
TEST(transport_that_ends_an_exchange_inside_its_cancel_is_not_heard)
{
    int recorded;

    for (recorded = 0; recorded < 2; recorded++) {
        scene s;
        llmcb_message m = { .role = LLMCB_USER, .content = "hi" };
        llmcb_op *op;
        begin(&s);
        scene_open(&s);
        s.spy.base.cancel = cancel_ends;
        llmcb_chat_free(s.chat);
        if (recorded)
            s.cd.transport =
                llmcb_record_new(s.loop, &s.spy.base, "/nonexistent/x");
        s.chat = llmcb_chat_new(s.loop, &s.cd);
        op = llmcb_chat_generate(s.chat, &m, 1, NULL);
        turn_to_request(&s, 1);
        llmcb_op_cancel(op);
        CHECK_INT(llmcb_op_wait(op), LLMCB_ECANCELLED);
        CHECK_INT(s.spy.open, 0);
        llmcb_op_free(op);
        scene_close(&s);
    }
}

/* ======== handlers that feed an exchange ================================== */

/* At a2 of the one call, a token of the other comes. */
static int act_say_other(rec *r, const llmcb_event *ev)
{
    stage *st = (stage *)r->user;

    if (ev->token && strcmp(ev->token->text.ptr, "a2") == 0) {
        st->done++;
        say(st->x_other, "b2");
    }
    return 0;
}

static int act_collect(rec *r, const llmcb_event *ev)
{
    stage *st = (stage *)r->user;

    if (ev->token)
        strcat(ev->run == llmcb_op_run(st->op) ? st->text : st->text_other,
               ev->token->text.ptr);
    return 0;
}

TEST(token_stays_its_own_when_a_handler_feeds_another_call)
{
    stage st;
    rec *first = rec_new("I1", INLINE), *second = rec_new("I2", INLINE);

    memset(&st, 0, sizeof st);
    begin(&st.s);
    first->act = act_say_other;
    second->act = act_collect;
    first->user = second->user = &st;
    scene_add(&st.s, first);
    scene_add(&st.s, second);
    scene_open(&st.s);
    st.op = call(&st.s);
    st.x = st.s.spy.fed;
    st.other = call(&st.s);
    st.x_other = st.s.spy.fed;
    say(st.x, "a1");
    say(st.x_other, "b1");
    turns(&st.s, 3);
    say(st.x, "a2|a3|a4");
    turns(&st.s, 3);
    CHECK_INT(st.done, 1);
    CHECK_STR(st.text, "a1a2a3a4");
    CHECK_STR(st.text_other, "b1b2");
    llmcb_op_cancel(st.op);
    llmcb_op_cancel(st.other);
    llmcb_op_wait(st.op);
    llmcb_op_wait(st.other);
    CHECK_REC(first);
    CHECK_REC(second);
    llmcb_op_free(st.op);
    llmcb_op_free(st.other);
    scene_close(&st.s);
    free(first);
    free(second);
}

/* At e, more of the same call comes; the blank lines are so many that no
 * buffer has room for them. */
static int act_say_more(rec *r, const llmcb_event *ev)
{
    stage *st = (stage *)r->user;
    char blank[6000];

    if (!ev->token || strcmp(ev->token->text.ptr, "e") != 0) return 0;
    memset(blank, '\n', sizeof blank);
    llmcb_exchange_data(st->x, blank, sizeof blank);
    say(st->x, "x|y");
    st->done++;
    return 0;
}

/* The first event that looks other than those before it is told no later than
 * inside the function that has the bytes of the second. */
#define OTHER(t) \
    "{\"id\":\"x\",\"choices\":[{\"delta\":{\"content\":\"" t "\"}}]}"

/* An inline handler that says more, one that is slow, and a call that has
 * begun. */
static void open_to_say_more(stage *st, rec *r, rec *slow, bool held)
{
    begin_with(st, r, act_say_more);
    if (held) st->s.cd.limits.window_events = 4;
    slow->ms = 1;
    scene_add(&st->s, slow);
    scene_open(&st->s);
    st->op = call(&st->s);
    st->x = st->s.spy.fed;
}

/* Everything is told once, and never a handler called inside itself. Held
 * bytes come before those that the handler brings while it is told of them. */
static void say_more(bool held)
{
    static const char all[] = "start|a|b|c|d|e|f|g|h|x|y||end";
    stage st;
    rec *r = rec_new("I", INLINE), *slow = rec_new("A", ASYNC);

    open_to_say_more(&st, r, slow, held);
    say(st.x, "a|b|c|d|" OTHER("e") "|" OTHER("f") "|g|h");
    if (held) CHECK_INT(st.done, 0);
    turns(&st.s, 100);
    CHECK_INT(st.done, 1);
    say(st.x, "$|[DONE]");
    CHECK_INT(llmcb_op_wait(st.op), LLMCB_OK);
    CHECK_REC(r);
    CHECK_REC(slow);
    CHECK_INT(strlen(r->log), strlen(all));
    if (held) CHECK_STR(r->log, all);
    CHECK_STR(slow->log, r->log);
    llmcb_op_free(st.op);
    scene_close(&st.s);
    free(r);
    free(slow);
}

/* Bytes that come at a, at b and, with the end, at e: each while what was
 * held before is given out, and that is used up. */
static int act_say_on(rec *r, const llmcb_event *ev)
{
    stage *st = (stage *)r->user;
    const char *text = ev->token ? ev->token->text.ptr : "";

    if (strcmp(text, "a") == 0) say(st->x, "b|c");
    if (strcmp(text, "b") == 0) say(st->x, "d|e");
    if (strcmp(text, "e") == 0) say(st->x, "f|$|[DONE]");
    return 0;
}

/* Last in the middle of a read that is given out to inline handlers alone: what
 * is left of that comes first. */
TEST(handler_that_feeds_its_call_to_the_end_sees_the_end)
{
    int way;

    for (way = 0; way < 3; way++) {
        bool recorded = way == 1, middle = way == 2;
        stage st;
        rec *r = rec_new("I", INLINE);

        begin_with(&st, r, act_say_on);
        scene_open(&st.s);
        if (recorded) {
            llmcb_chat_free(st.s.chat);
            st.s.cd.transport = llmcb_record_new(
                st.s.loop, &st.s.spy.base, "build/none/x.http");
            st.s.chat = llmcb_chat_new(st.s.loop, &st.s.cd);
        }
        st.op = call(&st.s);
        st.x = st.s.spy.fed;
        say(st.x, "0");
        turns(&st.s, 3);
        say(st.x, middle ? "1|a|2" : "a");
        turns(&st.s, 10);
        CHECK_INT(llmcb_op_code(st.op), LLMCB_OK);
        CHECK_STR(r->log, middle ? "start|0|1|a|2|b|c|d|e|f||end"
                                 : "start|0|a|b|c|d|e|f||end");
        CHECK_REC(r);
        llmcb_op_free(st.op);
        scene_close(&st.s);
        free(r);
    }
}

/* Whatever there is no memory for: an error, or the whole text. */
TEST(no_memory_for_bytes_of_a_handler_is_no_success)
{
    static const char pieces[] =
        "a|b|c|d|" OTHER("e") "|" OTHER("f") "|g|h";
    bool reached = true;
    long at;

    for (at = 1; reached; at++) {
        stage st;
        rec *r = rec_new("I", INLINE), *slow = rec_new("A", ASYNC);
        int before = test_failures_here;

        open_to_say_more(&st, r, slow, true);
        st.s.heap.calls = 0;
        st.s.heap.fail_at = at;
        say(st.x, pieces);
        turns(&st.s, 100);
        reached = heap_mend(&st.s.heap, at);
        if (st.s.spy.fed) say(st.s.spy.fed, "$|[DONE]");
        if (llmcb_op_wait(st.op) == LLMCB_OK)
            CHECK_STR(llmcb_op_text(st.op).ptr, "abcdefghxy");
        else
            CHECK_INT(llmcb_op_code(st.op), LLMCB_ENOMEM);
        CHECK_REC(r);
        CHECK_REC(slow);
        llmcb_op_free(st.op);
        scene_close(&st.s);
        free(r);
        free(slow);
        if (before != test_failures_here) {
            TEST_FAIL("at allocation %ld", at);
            return;
        }
    }
    CHECK(at > 10);
}

TEST(handler_that_feeds_its_own_call_is_not_called_inside_itself)
{
    say_more(false);
}

TEST(bytes_of_a_handler_come_behind_the_held_ones)
{
    say_more(true);
}

/* ======== workers ========================================================= */

/* A worker is inside the first of eight tokens that it could take at once. */
static llmcb_op *call_with_batch(scene *s, rec *r, gate *g)
{
    llmcb_op *op;

    begin(s);
    r->gate = g;
    r->gate_kind = LLMCB_LLM_NEW_TOKEN;
    scene_add(s, r);
    scene_open(s);
    op = call(s);
    feed_events(s, "a|b|c|d|e|f|g|h");
    turn_to_gate(s, g, 1);
    return op;
}

TEST(worker_takes_no_more_of_a_batch_after_a_cancel)
{
    gate g = GATE;
    scene s;
    rec *r = rec_new("S", SYNC);
    llmcb_op *op = call_with_batch(&s, r, &g);

    llmcb_op_cancel(op);
    turns(&s, 3);
    gate_let(&g, ALL);
    CHECK_INT(llmcb_op_wait(op), LLMCB_ECANCELLED);
    CHECK_STR(r->log, "start|a|error:ECANCELLED-7");
    CHECK_REC(r);
    llmcb_op_free(op);
    scene_close(&s);
    free(r);
}

static void post_lets(void *arg)
{
    gate_let((gate *)arg, ALL);
}

/* Opens the gate a turn after its cancel. */
static llmcb_step lets_after_cancel(llmcb_task *t)
{
    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_sleep(t, LLMCB_FOREVER));
    llmcb_loop_post(llmcb_task_loop(t), post_lets, t->self);
    LLMCB_END(t);
}

TEST(worker_takes_no_more_of_a_batch_when_the_loop_is_freed)
{
    gate g = GATE;
    scene s;
    rec *r = rec_new("S", SYNC);

    call_with_batch(&s, r, &g);
    llmcb_task_start(s.loop, lets_after_cancel, 0, &g);
    turns(&s, 2);
    scene_close(&s);
    CHECK_STR(r->log, "start|a|error:ECANCELLED-7");
    CHECK_REC(r);
    free(r);
}

/* ======== the end of a loop =============================================== */

TEST(loop_is_freed_with_coroutines_that_do_not_end)
{
    scene s;
    llmcb_handler h;

    memset(&h, 0, sizeof h);
    h.async.on_chat_model_start = handler_stays;
    begin(&s);
    add(&s, &h);
    scene_open(&s);
    scene_call(&s);
    turns(&s, 3);
    llmcb_task_start(s.loop, stays, 0, NULL);
    llmcb_task_start(s.loop, stays, 0, NULL);
    turns(&s, 3);
    close_late(&s);
}

TEST(loop_is_freed_while_a_late_handler_awaits_what_does_not_end)
{
    scene s;
    late l;
    llmcb_op *op;

    begin(&s);
    late_add(&s, &l);
    scene_open(&s);
    op = scene_call(&s);
    l.op = llmcb_task_start(s.loop, stays, 0, NULL);
    CHECK_INT(llmcb_op_wait(op), LLMCB_ETIMEDOUT);
    turns(&s, 3);
    close_late(&s);
}

static int nothing(void *arg)
{
    (void)arg;
    return 0;
}

/* Ends when the time of llmcb_loop_free is just over. */
static llmcb_step ends_at_the_deadline(llmcb_task *t)
{
    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_sleep(t, LLMCB_FOREVER));
    sys.mono_ms += 50;
    LLMCB_END(t);
}

TEST(idle_threads_are_given_time_to_leave_at_the_deadline)
{
    scene s;
    llmcb_op *job;

    begin(&s);
    scene_open(&s);
    job = llmcb_offload(s.loop, nothing, NULL);
    CHECK_INT(llmcb_op_wait(job), LLMCB_OK);
    llmcb_op_free(job);
    llmcb_task_start(s.loop, ends_at_the_deadline, 0, NULL);
    turns(&s, 2);
    scene_close(&s);
}

/* Opens the gate in the last turn of llmcb_loop_free, after this has asked how
 * far the workers are. */
static llmcb_step lets_in_the_last_turn(llmcb_task *t)
{
    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_sleep(t, LLMCB_FOREVER));
    sys.mono_ms += 50;
    llmcb_loop_post(llmcb_task_loop(t), post_lets, t->self);
    LLMCB_END(t);
}

TEST(nothing_leaks_when_a_handler_returns_in_the_grace)
{
    gate g = GATE;
    scene s;
    rec *r = rec_new("S", SYNC);

    begin(&s);
    r->gate = &g;
    scene_add(&s, r);
    scene_open(&s);
    scene_call(&s);
    llmcb_task_start(s.loop, lets_in_the_last_turn, 0, &g);
    turn_to_gate(&s, &g, 1);
    turns(&s, 2);
    close_late(&s);
    free(r);
}

/* ======== the functions of a host ========================================= */

typedef struct push {
    llmcb_loop *loop;
    llmcb_op *op; /* that watch frees when fd is forgotten, or timer starts */
    int fd;
    int64_t wish;
    int done;
} push;

static void watch_nothing(void *user, int fd, int events)
{
    (void)user;
    (void)fd;
    (void)events;
}

static void watch_frees(void *user, int fd, int events)
{
    push *p = (push *)user;
    llmcb_op *op = p->op;

    if (fd != p->fd || events || !op || !llmcb_op_done(op)) return;
    p->op = NULL;
    p->done++;
    llmcb_op_free(op);
}

static void timer_keeps(void *user, int64_t ms)
{
    ((push *)user)->wish = ms;
}

static llmcb_step ends(llmcb_task *t)
{
    *(bool *)t->self = true;
    return LLMCB_DONE;
}

static bool ended;

static void timer_starts(void *user, int64_t ms)
{
    push *p = (push *)user;

    p->wish = ms;
    if (ms > 0 && !p->op) p->op = llmcb_task_start(p->loop, ends, 0, &ended);
}

static llmcb_step sleeps(llmcb_task *t)
{
    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_sleep(t, 60000));
    LLMCB_END(t);
}

static llmcb_step awaits_fd(llmcb_task *t)
{
    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t,
                llmcb_await_fd(t, *(int *)t->self, LLMCB_READ, LLMCB_FOREVER));
    LLMCB_END(t);
}

TEST(host_is_told_of_what_its_timer_function_has_started)
{
    push p = { .fd = -1 };
    llmcb_host host = { watch_nothing, timer_starts, &p };
    scene s;
    llmcb_op *op;

    begin(&s);
    s.ld.virtual_clock = false;
    scene_open(&s);
    p.loop = s.loop;
    ended = false;
    llmcb_loop_set_host(s.loop, &host);
    op = llmcb_task_start(s.loop, sleeps, 0, NULL);
    CHECK_INT(p.wish, 0);
    CHECK(!p.op);
    llmcb_loop_timer_event(s.loop);
    CHECK(p.op != NULL);
    CHECK_INT(p.wish, 0);
    llmcb_loop_timer_event(s.loop);
    CHECK(ended);
    CHECK(p.wish > 0);
    llmcb_op_free(p.op);
    llmcb_op_free(op);
    scene_close(&s);
}

/* The op's own coroutine, which it gave up on, lets go of the descriptor. */
TEST(watch_function_frees_the_op_of_a_late_handler)
{
    push p = { .fd = -1 };
    llmcb_host host = { watch_frees, timer_keeps, &p };
    scene s;
    late l;
    int fds[2];

    REQUIRE(pipe(fds) == 0);
    begin(&s);
    late_add(&s, &l);
    p.fd = l.fd = fds[0];
    scene_open(&s);
    llmcb_loop_set_host(s.loop, &host);
    p.op = scene_call(&s);
    CHECK_INT(llmcb_op_wait(p.op), LLMCB_ETIMEDOUT);
    turns(&s, 2);
    CHECK_INT(write(fds[1], "x", 1), 1);
    turns(&s, 3);
    CHECK_INT(p.done, 1);
    llmcb_op_free(p.op);
    scene_close(&s);
    close(fds[0]);
    close(fds[1]);
}

/* The op that is freed is the next in turn when cancels are taken. */
TEST(watch_function_frees_another_op_while_one_is_cancelled)
{
    push p = { .fd = -1 };
    llmcb_host host = { watch_frees, timer_keeps, &p };
    scene s;
    llmcb_op *op;
    int fds[2];

    REQUIRE(pipe(fds) == 0);
    begin(&s);
    p.fd = fds[0];
    scene_open(&s);
    llmcb_loop_set_host(s.loop, &host);
    p.op = llmcb_task_start(s.loop, ends, 0, &ended);
    op = llmcb_task_start(s.loop, awaits_fd, 0, &fds[0]);
    turns(&s, 2);
    CHECK(llmcb_op_done(p.op));
    llmcb_op_cancel(op);
    turns(&s, 2);
    CHECK_INT(p.done, 1);
    CHECK(llmcb_op_done(op));
    llmcb_op_free(op);
    scene_close(&s);
    close(fds[0]);
    close(fds[1]);
}

static llmcb_step breaks(llmcb_task *t)
{
    (void)t;
    return LLMCB_EIO;
}

static llmcb_step asks_for_its_code(llmcb_task *t)
{
    llmcb_op *op = (llmcb_op *)t->self;

    return llmcb_op_wait(op) == LLMCB_EIO &&
                   llmcb_loop_run_until(llmcb_task_loop(t), op) == LLMCB_EIO
               ? LLMCB_DONE
               : LLMCB_ESTATE;
}

/* What is done is not waited for. */
TEST(code_of_what_is_done_is_had_inside_a_callback)
{
    llmcb_op *op, *asks;
    scene s;

    begin(&s);
    scene_open(&s);
    op = llmcb_task_start(s.loop, breaks, 0, NULL);
    CHECK_INT(llmcb_op_wait(op), LLMCB_EIO);
    asks = llmcb_task_start(s.loop, asks_for_its_code, 0, op);
    CHECK_INT(llmcb_op_wait(asks), LLMCB_OK);
    llmcb_op_free(asks);
    llmcb_op_free(op);
    scene_close(&s);
}

/* Neither libcurl nor sockets, and none of the program's. */
TEST(chat_without_a_transport_says_so)
{
    llmcb_loop *loop = llmcb_loop_new(NULL);
    llmcb_chat *chat = llmcb_chat_new(
        loop, &(llmcb_chat_desc){ .base_url = "http://127.0.0.1/v1" });
    llmcb_op *op = llmcb_chat_generate(
        chat, &(llmcb_message){ .content = "a" }, 1, NULL);

    CHECK_INT(llmcb_op_wait(op), LLMCB_EINVAL);
    CHECK_STR(llmcb_op_error(op)->message,
              "there is no transport: this build has none");
    llmcb_op_free(op);
    llmcb_chat_free(chat);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
}

int main(int argc, char **argv)
{
    return scene_main(argc, argv);
}

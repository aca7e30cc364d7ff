/* Rows of LangChain's rules, as llmcb keeps or changes them, that have no
 * test named after them elsewhere: the number in a name is the row's. Each
 * stands on its own and checks what its row says, on recordings and the
 * virtual clock, through the public functions alone. */
#include "scene.h"

/* ---- a call, and what its one handler was told --------------------------- */

#define JSON_HEAD "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"
#define FAIL(status, fields) \
    "HTTP/1.1 " status " X\r\n" fields "Content-Length: 0\r\n\r\n"

typedef struct told {
    char labels[512]; /* tags, then metadata, of the start */
    char text[128], model[32], finish[32]; /* of the finish */
    llmcb_usage usage;
    llmcb_error error;
    size_t n_retries;
    struct {
        int attempt, status;
        int64_t delay;
    } retry[4];
} told;

typedef struct play {
    scene s; /* first */
    rec *r;
    told t;
    llmcb_op *op;
} play;

static void write_labels(char *out, size_t cap, const llmcb_run *run)
{
    size_t i, n = strlen(out);

    for (i = 0; i < run->n_tags; i++)
        n += (size_t)snprintf(out + n, cap - n, "%s,", run->tags[i]);
    for (i = 0; i < run->n_metadata; i++)
        n += (size_t)snprintf(out + n, cap - n, "%s=%s,",
                              run->metadata[i].key, run->metadata[i].value);
}

static int act_tell(rec *r, const llmcb_event *ev)
{
    told *t = (told *)r->user;

    if (ev->start) write_labels(t->labels, sizeof t->labels, ev->run);
    if (ev->error) t->error = *ev->error;
    if (ev->retry && t->n_retries < 4) {
        t->retry[t->n_retries].attempt = ev->retry->attempt;
        t->retry[t->n_retries].status = ev->retry->error->http_status;
        t->retry[t->n_retries++].delay = ev->retry->delay_ms;
    }
    if (ev->result) {
        t->usage = ev->result->usage;
        strcpy(t->model, ev->result->model_name.ptr);
        if (ev->result->n_generations) {
            strcpy(t->text, ev->result->generations[0].text.ptr);
            strcpy(t->finish, ev->result->generations[0].finish_reason.ptr);
        }
    }
    return 0;
}

static void play_init(play *p)
{
    memset(p, 0, sizeof *p);
    scene_init(&p->s);
    p->r = rec_new("A", ASYNC);
    p->r->act = act_tell;
    p->r->user = &p->t;
    scene_add(&p->s, p->r);
}

/* One answer of events, one of bytes. */
static void play_says(play *p, const char *pieces, llmcb_replay_end end)
{
    scene_tape(&p->s, OK_HEAD, pieces, 0, end);
}

static void play_sends(play *p, const char *bytes, llmcb_replay_end end)
{
    scene_tape(&p->s, bytes, "", 0, end);
}

/* When the requests left. */
static int64_t asked_at[8];

static llmcb_code timed_start(llmcb_transport *tr, llmcb_exchange *x,
                              const llmcb_request *q)
{
    unsigned i = ((spy *)(void *)tr)->requests;

    if (i < 8) asked_at[i] = llmcb_loop_now(tr->loop);
    return spy_start(tr, x, q);
}

static void play_open(play *p)
{
    if (!scene_open(&p->s)) abort();
    p->s.spy.base.start = timed_start;
}

static llmcb_code play_call(play *p)
{
    play_open(p);
    p->op = scene_call(&p->s);
    return llmcb_op_wait(p->op);
}

static void play_end(play *p)
{
    CHECK_REC(p->r);
    llmcb_op_free(p->op);
    scene_close(&p->s);
    free(p->r);
}

/* Asks once, and is answered with events. */
static llmcb_code ask(play *p, const char *pieces, llmcb_replay_end end)
{
    play_init(p);
    play_says(p, pieces, end);
    return play_call(p);
}

static const llmcb_generation *first(const play *p)
{
    static const llmcb_generation none = { { "", 0 }, { "", 0 }, { "", 0 },
                                           { "", 0 }, { "", 0 }, NULL, 0 };
    const llmcb_result *r = llmcb_op_result(p->op);

    return r->n_generations ? &r->generations[0] : &none;
}

/* ---- groups, and a handler that tells the runs of a tree apart ----------- */

/* Writes +name, -name and !name for starts, ends and errors. */
typedef struct ear {
    llmcb_handler h; /* first */
    char log[512], labels[512];
} ear;

static llmcb_step ear_event(llmcb_task *t, llmcb_handler *h,
                            const llmcb_event *ev)
{
    ear *e = (ear *)(void *)h;
    size_t n = strlen(e->log);

    (void)t;
    snprintf(e->log + n, sizeof e->log - n, "%s%c%s", n ? " " : "",
             ev->start   ? '+'
             : ev->error ? '!'
                         : '-',
             ev->run->name);
    if (ev->start) {
        n = strlen(e->labels);
        snprintf(e->labels + n, sizeof e->labels - n, "%s:", ev->run->name);
        write_labels(e->labels, sizeof e->labels, ev->run);
    }
    return LLMCB_DONE;
}

static void ear_init(ear *e)
{
    memset(e, 0, sizeof *e);
    e->h.async.on_chain_start = e->h.async.on_chain_end =
        e->h.async.on_chain_error = e->h.async.on_chat_model_start =
            e->h.async.on_llm_end = e->h.async.on_llm_error = ear_event;
}

static llmcb_op *group(scene *s, const char *name, const llmcb_config *c)
{
    llmcb_run_desc d;

    memset(&d, 0, sizeof d);
    d.name = name;
    return llmcb_run_start(s->loop, &d, c);
}

static void group_end(llmcb_op *op)
{
    CHECK_INT(llmcb_run_end(llmcb_op_run(op), llmcb_text("")), LLMCB_OK);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    llmcb_op_free(op);
}

/* A run p with that configuration, and q within it; what q inherits. */
static llmcb_config family(scene *s, const llmcb_config *c)
{
    llmcb_op *p = group(s, "p", c);
    llmcb_config within = llmcb_run_child(llmcb_op_run(p), NULL);

    group_end(group(s, "q", &within));
    group_end(p);
    return within; /* its numbers: what it points to is gone */
}

/* ======== dispatch ======================================================== */

TEST(case_003_only_the_chat_start_is_told)
{
    play p;

    play_init(&p);
    p.r->h.async.on_llm_start = rec_async;
    play_says(&p, "a" DONE, LLMCB_REPLAY_KEEP);
    CHECK_INT(play_call(&p), LLMCB_OK);
    CHECK_STR(p.r->log, "start|a||end");
    play_end(&p);
}

/* One mask a handler: whoever skips LLM events is told of no start in the
 * place of another either, and of no end without one. */
TEST(case_005_a_skipped_llm_has_no_start_and_no_end)
{
    int skip;

    for (skip = 0; skip < 2; skip++) {
        play p;
        rec *only = rec_new("O", ASYNC);

        play_init(&p);
        only->h.async.on_chat_model_start = NULL;
        only->h.async.on_llm_start = rec_async;
        only->h.skip = skip ? LLMCB_SKIP_LLM : 0;
        scene_add(&p.s, only);
        play_says(&p, "a" DONE, LLMCB_REPLAY_KEEP);
        CHECK_INT(play_call(&p), LLMCB_OK);
        CHECK_STR(only->log, skip ? "" : "llm(Human: hi)|a||end");
        CHECK_STR(p.r->log, "start|a||end");
        play_end(&p);
        free(only);
    }
}

/* A task that is to run each 10 ms, and how long it had to wait at most. */
typedef struct ticker {
    int64_t last, gap;
    unsigned ticks;
    bool stop;
} ticker;

static llmcb_step tick(llmcb_task *t)
{
    ticker *k = (ticker *)t->self;

    LLMCB_BEGIN(t);
    while (!k->stop) {
        int64_t now;
        LLMCB_AWAIT(t, llmcb_sleep(t, 10));
        now = llmcb_loop_now(llmcb_task_loop(t));
        if (now - k->last > k->gap) k->gap = now - k->last;
        k->last = now;
        k->ticks++;
    }
    LLMCB_END(t);
}

typedef struct inline_place {
    llmcb_loop *loop;
    pthread_t thread;
    const ticker *k;
    unsigned right;
} inline_place;

/* Works for 100 ms in the start event. */
static int act_work(rec *r, const llmcb_event *ev)
{
    inline_place *at = (inline_place *)r->user;
    unsigned ticks;

    if (!ev->start || !pthread_equal(pthread_self(), at->thread)) return 0;
    ticks = at->k->ticks;
    at->right = llmcb_clock_advance(at->loop, 100) == LLMCB_OK &&
                at->k->ticks == ticks;
    return 0;
}

TEST(case_016_an_inline_handler_stops_the_loop)
{
    play p;
    rec *i = rec_new("I", INLINE);
    ticker k;
    inline_place at;
    llmcb_op *ticking;

    memset(&k, 0, sizeof k);
    play_init(&p);
    play_says(&p, "a" DONE, LLMCB_REPLAY_KEEP);
    i->act = act_work;
    i->user = &at;
    scene_add(&p.s, i);
    play_open(&p);
    at.loop = p.s.loop;
    at.thread = pthread_self();
    at.k = &k;
    at.right = 0;
    ticking = llmcb_task_start(p.s.loop, tick, 0, &k);
    while (k.ticks < 3) llmcb_loop_run_once(p.s.loop, LLMCB_FOREVER);
    CHECK_INT(k.gap, 10);
    p.op = scene_call(&p.s);
    CHECK_INT(llmcb_op_wait(p.op), LLMCB_OK);
    k.stop = true;
    CHECK_INT(llmcb_op_wait(ticking), LLMCB_OK);
    CHECK(at.right);
    CHECK(k.gap >= 100 && k.gap <= 110);
    llmcb_op_free(ticking);
    CHECK_REC(i);
    play_end(&p);
    free(i);
}

static int act_fail_token(rec *r, const llmcb_event *ev)
{
    (void)r;
    return ev->token ? (int)LLMCB_EJSON : 0;
}

TEST(case_023_a_failure_reaches_the_blocking_caller)
{
    play p;

    play_init(&p);
    play_says(&p, "a|b" DONE, LLMCB_REPLAY_KEEP);
    p.r->act = act_fail_token;
    p.r->h.flags = LLMCB_RAISE;
    CHECK_INT(play_call(&p), LLMCB_EHANDLER);
    CHECK_INT(llmcb_op_error(p.op)->handler_result, LLMCB_EJSON);
    CHECK_STR(p.r->log, "start|a|error:EHANDLER");
    play_end(&p);
}

/* An async handler of a call that a coroutine waits for, beside a sync one. */
typedef struct compass {
    llmcb_handler h; /* first */
    llmcb_loop *loop;
    pthread_t thread;
    unsigned right, events;
} compass;

static llmcb_step compass_event(llmcb_task *t, llmcb_handler *h,
                                const llmcb_event *ev)
{
    compass *c = (compass *)(void *)h;

    (void)ev;
    LLMCB_BEGIN(t);
    c->events++;
    LLMCB_AWAIT(t, llmcb_sleep(t, 5));
    c->right += llmcb_task_loop(t) == c->loop &&
                pthread_equal(pthread_self(), c->thread);
    LLMCB_END(t);
}

static llmcb_step call_in_task(llmcb_task *t)
{
    play *p = (play *)t->self;

    LLMCB_BEGIN(t);
    p->op = scene_call(&p->s);
    LLMCB_AWAIT(t, llmcb_await(t, p->op));
    return t->result;
    LLMCB_END(t);
}

TEST(case_024_async_handlers_stay_on_their_loop)
{
    play p;
    rec *sync = rec_new("S", SYNC);
    compass c;
    llmcb_op *task;

    memset(&c, 0, sizeof c);
    c.h.async.on_chat_model_start = c.h.async.on_llm_new_token =
        c.h.async.on_llm_end = compass_event;
    play_init(&p);
    scene_add(&p.s, sync);
    p.s.handlers[p.s.n_handlers++] = &c.h;
    play_says(&p, "a" DONE, LLMCB_REPLAY_KEEP);
    play_open(&p);
    c.loop = p.s.loop;
    c.thread = pthread_self();
    task = llmcb_task_start(p.s.loop, call_in_task, 0, &p);
    CHECK_INT(llmcb_op_wait(task), LLMCB_OK);
    CHECK_INT(c.events, 4); /* the start, "a", the finish reason, the end */
    CHECK_INT(c.right, 4);
    llmcb_op_free(task);
    CHECK_REC(sync);
    play_end(&p);
    free(sync);
}

/* ======== configurations ================================================== */

TEST(case_028_request_handlers_come_before_the_chats)
{
    static const mode modes[] = { ASYNC, INLINE };
    size_t i;

    for (i = 0; i < 2; i++) {
        scene s;
        rec *r = rec_new("R", modes[i]), *c = rec_new("C", modes[i]);
        llmcb_op *op;

        scene_init(&s);
        scene_tape(&s, OK_HEAD, "a|b" DONE, 0, LLMCB_REPLAY_KEEP);
        scene_add(&s, c);
        r->h.flags |= LLMCB_AWAIT_EACH;
        c->h.flags |= LLMCB_AWAIT_EACH;
        r->ms = c->ms = 10;
        scene_open(&s);
        op = scene_call_with(&s, r);
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        CHECK(before("R<start", "C<start") && before("C<start", "R<a"));
        CHECK(before("R<a", "C<a") && before("C<a", "R<b"));
        CHECK(before("R<b", "C<b") && before("C<b", "R<end"));
        CHECK(before("R<end", "C<end"));
        CHECK_REC(r);
        CHECK_REC(c);
        llmcb_op_free(op);
        scene_close(&s);
        free(r);
        free(c);
    }
}

/* What is local wins in this run and takes nothing from its children; so
 * does what a chat says of its own runs. */
TEST(case_032_own_metadata_wins_in_this_run_only)
{
    static const llmcb_pair one[] = { { "k", "1" } }, two[] = { { "k", "2" } };
    play p;
    ear e;
    llmcb_handler *list[1];
    llmcb_config c;

    ear_init(&e);
    list[0] = &e.h;
    memset(&c, 0, sizeof c);
    c.callbacks = list;
    c.metadata = one;
    c.n_callbacks = c.n_metadata = 1;
    c.local_metadata = two;
    c.n_local_metadata = 1;
    play_init(&p);
    p.s.cd.metadata = two;
    p.s.cd.n_metadata = 1;
    play_says(&p, "a" DONE, LLMCB_REPLAY_KEEP);
    play_open(&p);
    family(&p.s, &c);
    CHECK_STR(e.labels, "p:k=2,q:k=1,");
    c.n_local_metadata = 0;
    c.n_callbacks = 0;
    {
        llmcb_message hi;
        memset(&hi, 0, sizeof hi);
        hi.content = "hi";
        p.op = llmcb_chat_generate(p.s.chat, &hi, 1, &c);
    }
    CHECK_INT(llmcb_op_wait(p.op), LLMCB_OK);
    CHECK(strncmp(p.t.labels, "k=2,", 4) == 0);
    CHECK(!strstr(p.t.labels, "k=1"));
    play_end(&p);
}

/* There is no manager to remove from: a list is a list of the program's. */
static size_t remove_from(llmcb_handler **list, size_t n,
                          const llmcb_handler *h)
{
    size_t i, k = 0;

    for (i = 0; i < n; i++)
        if (list[i] != h) list[k++] = list[i];
    return k;
}

TEST(case_035_a_handler_removed_from_both_lists)
{
    play p;
    ear h, other;
    llmcb_handler *list[2], *local[2];
    llmcb_config c;
    int i;

    ear_init(&h);
    ear_init(&other);
    list[0] = local[1] = &h.h;
    list[1] = local[0] = &other.h;
    memset(&c, 0, sizeof c);
    c.callbacks = list;
    c.local_callbacks = local;
    c.n_callbacks = c.n_local_callbacks = 2;
    play_init(&p);
    play_open(&p);
    for (i = 0; i < 3; i++) { /* there; removed; removed though absent */
        h.log[0] = other.log[0] = '\0';
        family(&p.s, &c);
        CHECK_STR(h.log, i ? "" : "+p +q -q -p");
        CHECK_STR(other.log, "+p +q -q -p");
        c.n_callbacks = remove_from(list, c.n_callbacks, &h.h);
        c.n_local_callbacks = remove_from(local, c.n_local_callbacks, &h.h);
        CHECK_INT(c.n_callbacks, 1);
        CHECK_INT(c.n_local_callbacks, 1);
    }
    play_end(&p);
}

TEST(case_036_handlers_that_are_not_inherited)
{
    play p;
    ear h;
    llmcb_handler *list[1];
    llmcb_config c, within;

    ear_init(&h);
    list[0] = &h.h;
    memset(&c, 0, sizeof c);
    c.local_callbacks = list;
    c.n_local_callbacks = 1;
    play_init(&p);
    play_open(&p);
    within = family(&p.s, &c);
    CHECK_STR(h.log, "+p -p");
    CHECK_INT(within.n_callbacks, 0);
    CHECK_INT(within.n_local_callbacks, 0);
    play_end(&p);
}

/* The console handler of LangChain's debug switch is a hook here. */
TEST(case_041_a_hook_is_told_once_of_a_run_and_its_child)
{
    play p;
    ear h;

    ear_init(&h);
    play_init(&p);
    play_open(&p);
    CHECK_INT(llmcb_loop_hook(p.s.loop, &h.h), LLMCB_OK);
    family(&p.s, NULL);
    CHECK_STR(h.log, "+p +q -q -p");
    play_end(&p);
}

TEST(case_042_a_hook_does_not_change_the_configuration)
{
    int listed;

    for (listed = 0; listed < 2; listed++) {
        play p;
        ear h, other;
        llmcb_handler *list[2], *was[2];
        llmcb_config c, same;

        ear_init(&h);
        ear_init(&other);
        list[0] = &other.h;
        list[1] = &h.h;
        memcpy(was, list, sizeof was);
        memset(&c, 0, sizeof c);
        c.callbacks = list;
        c.n_callbacks = listed ? 2 : 1;
        same = c;
        play_init(&p);
        play_open(&p);
        CHECK_INT(llmcb_loop_hook(p.s.loop, &h.h), LLMCB_OK);
        CHECK_INT(llmcb_loop_hook(p.s.loop, &h.h), LLMCB_OK);
        CHECK_INT(family(&p.s, &c).n_callbacks, c.n_callbacks);
        CHECK_STR(h.log, "+p +q -q -p");
        CHECK_STR(other.log, "+p +q -q -p");
        CHECK(memcmp(&c, &same, sizeof c) == 0);
        CHECK(memcmp(list, was, sizeof was) == 0);
        play_end(&p);
    }
}

/* A group with one handler, and no hook. */
static llmcb_op *group_of(play *p, ear *e, llmcb_config *c,
                          llmcb_handler **list)
{
    ear_init(e);
    list[0] = &e->h;
    memset(c, 0, sizeof *c);
    c->callbacks = list;
    c->n_callbacks = 1;
    play_init(p);
    play_says(p, "a" DONE, LLMCB_REPLAY_KEEP);
    play_open(p);
    return group(&p->s, "group", c);
}

TEST(case_048_a_cancelled_group_gets_one_error)
{
    play p;
    ear e;
    llmcb_handler *list[1];
    llmcb_config c;
    llmcb_op *op = group_of(&p, &e, &c, list);

    turns(&p.s, 3);
    llmcb_op_cancel(op);
    CHECK_INT(llmcb_op_wait(op), LLMCB_ECANCELLED);
    llmcb_op_cancel(op);
    turns(&p.s, 3);
    CHECK_STR(e.log, "+group !group");
    llmcb_op_free(op);
    play_end(&p);
}

TEST(case_049_handlers_of_a_group_see_its_start_and_end)
{
    play p;
    ear e;
    llmcb_handler *list[1];
    llmcb_config c;
    llmcb_message hi;
    llmcb_op *op = group_of(&p, &e, &c, list);

    memset(&hi, 0, sizeof hi);
    hi.content = "hi";
    c = llmcb_run_child(llmcb_op_run(op), NULL);
    p.op = llmcb_chat_generate(p.s.chat, &hi, 1, &c);
    CHECK_INT(llmcb_op_wait(p.op), LLMCB_OK);
    group_end(op);
    CHECK_STR(e.log, "+group +ChatOpenAI -ChatOpenAI -group");
    play_end(&p);
}

/* ======== chat calls ====================================================== */

TEST(case_054_without_streaming_there_are_no_tokens)
{
    play p;

    play_init(&p);
    p.s.cd.streaming = false;
    play_sends(&p, JSON_HEAD "{\"choices\":[{\"message\":{\"content\":"
                             "\"Why\"},\"finish_reason\":\"stop\"}]}",
               LLMCB_REPLAY_CLOSE);
    CHECK_INT(play_call(&p), LLMCB_OK);
    CHECK_STR(p.r->log, "start|end");
    CHECK_STR(p.t.text, "Why");
    play_end(&p);
}

/* The program of LangChain's page: what it prints. The barriers keep its two
 * handlers apart, so that there is nothing to lock. */
static char page[1024];

static int page_token(llmcb_handler *h, const llmcb_event *ev)
{
    (void)h;
    strcat(strcat(strcat(page, "token: "), ev->token->text.ptr), "\n");
    return 0;
}

static llmcb_step page_sleep(llmcb_task *t, llmcb_handler *h,
                             const llmcb_event *ev)
{
    (void)h;
    LLMCB_BEGIN(t);
    strcat(page, "zzzz....\n");
    LLMCB_AWAIT(t, llmcb_sleep(t, 300));
    if (ev->kind == LLMCB_LLM_START)
        strcat(strcat(page, ev->start->prompt.ptr), "\n");
    strcat(page, "Hi! I just woke up. Your llm is ");
    strcat(page, ev->kind == LLMCB_LLM_END ? "ending\n" : "starting\n");
    LLMCB_END(t);
}

TEST(case_055_the_program_of_the_page)
{
    llmcb_handler sync, async;
    play p;

    memset(&sync, 0, sizeof sync);
    memset(&async, 0, sizeof async);
    sync.sync.on_llm_new_token = page_token;
    async.async.on_llm_start = async.async.on_llm_end = page_sleep;
    page[0] = '\0';
    play_init(&p);
    p.s.handlers[p.s.n_handlers++] = &sync;
    p.s.handlers[p.s.n_handlers++] = &async;
    play_says(&p, "|Why| don|'t" DONE, LLMCB_REPLAY_KEEP);
    CHECK_INT(play_call(&p), LLMCB_OK);
    CHECK_STR(page, "zzzz....\n"
                    "Human: hi\n"
                    "Hi! I just woke up. Your llm is starting\n"
                    "token: \ntoken: Why\ntoken:  don\ntoken: 't\ntoken: \n"
                    "zzzz....\n"
                    "Hi! I just woke up. Your llm is ending\n");
    CHECK_INT(asked_at[0], 300); /* the request waits for the start */
    CHECK_INT(llmcb_loop_now(p.s.loop), 600);
    play_end(&p);
}

TEST(case_058_a_batch_gives_back_what_succeeded)
{
    play p;
    llmcb_message hi;
    llmcb_prompt prompts[3];
    size_t i;

    memset(&hi, 0, sizeof hi);
    hi.content = "hi";
    play_init(&p);
    play_says(&p, "one" DONE, LLMCB_REPLAY_KEEP);
    play_sends(&p, FAIL("400", ""), LLMCB_REPLAY_KEEP);
    play_says(&p, "three" DONE, LLMCB_REPLAY_KEEP);
    play_open(&p);
    for (i = 0; i < 3; i++) {
        prompts[i].messages = &hi;
        prompts[i].n = 1;
    }
    p.op = llmcb_chat_batch(p.s.chat, prompts, 3, NULL);
    CHECK_INT(llmcb_op_wait(p.op), LLMCB_EHTTP);
    REQUIRE(llmcb_op_n_prompts(p.op) == 3);
    for (i = 0; i < 3; i++) {
        const llmcb_result *r = llmcb_op_result_at(p.op, i);
        CHECK_INT(llmcb_op_error_at(p.op, i)->code,
                  i == 1 ? LLMCB_EHTTP : LLMCB_OK);
        CHECK_INT(r->complete, i != 1);
        if (i != 1) {
            REQUIRE(r->n_generations == 1);
            CHECK_STR(r->generations[0].text.ptr, i ? "three" : "one");
        }
    }
    play_end(&p);
}

TEST(case_061_an_error_event_has_the_partial_text)
{
    play p;

    CHECK_INT(ask(&p, "a|b", LLMCB_REPLAY_RESET), LLMCB_EIO);
    CHECK_STR(p.r->log, "start|a|b|error:EIO");
    CHECK_STR(p.t.text, "ab");
    play_end(&p);
}

/* Reads what there is of a stream, at most `most` chunks. */
static void read_chunks(play *p, int most, char *text)
{
    const llmcb_chunk *chunk;

    *text = '\0';
    play_open(p);
    p->op = scene_stream(&p->s);
    while (most-- && llmcb_op_next(p->op, &chunk))
        strcat(strcat(text, chunk->text.ptr), "|");
}

TEST(case_062_a_stream_that_fails_after_two_chunks)
{
    char text[64];
    play p;

    play_init(&p);
    play_says(&p, "a|b", LLMCB_REPLAY_RESET);
    read_chunks(&p, 9, text);
    CHECK_STR(text, "a|b|");
    CHECK_INT(llmcb_op_wait(p.op), LLMCB_EIO);
    CHECK_STR(p.r->log, "start|a|b|error:EIO");
    CHECK_STR(p.t.text, "ab");
    play_end(&p);
}

TEST(case_064_a_stream_cancelled_after_two_chunks)
{
    char text[64];
    play p;

    play_init(&p);
    scene_tape(&p.s, OK_HEAD, "a|b|c" DONE, 50, LLMCB_REPLAY_KEEP);
    read_chunks(&p, 2, text);
    CHECK_STR(text, "a|b|");
    llmcb_op_cancel(p.op);
    CHECK_INT(llmcb_op_wait(p.op), LLMCB_ECANCELLED);
    CHECK_STR(p.r->log, "start|a|b|error:ECANCELLED");
    CHECK_INT(p.t.error.detail, LLMCB_DETAIL_CALLER);
    CHECK_STR(p.t.text, "ab");
    play_end(&p);
}

/* Both ways of asking fail alike. */
TEST(case_069_a_stream_without_a_chunk)
{
    char text[64], message[256] = "";
    int stream;

    for (stream = 0; stream < 2; stream++) {
        play p;

        play_init(&p);
        play_says(&p, "[DONE]", LLMCB_REPLAY_KEEP);
        if (stream) read_chunks(&p, 9, text);
        else play_call(&p);
        CHECK_INT(llmcb_op_wait(p.op), LLMCB_ETRUNCATED);
        CHECK_STR(p.r->log, "start|error:ETRUNCATED");
        CHECK_STR(p.t.error.message, llmcb_op_error(p.op)->message);
        if (stream) {
            CHECK_STR(text, "");
            CHECK_STR(p.t.error.message, message);
        }
        strcpy(message, p.t.error.message);
        play_end(&p);
    }
}

TEST(case_071_ls_metadata_overrides_the_users)
{
    static const llmcb_pair own[] = { { "ls_provider", "x" },
                                      { "ls_model_name", "x" },
                                      { "ls_model_type", "x" },
                                      { "ls_max_tokens", "x" },
                                      { "mine", "y" } };
    play p;

    play_init(&p);
    p.s.cd.model = "m";
    p.s.cd.max_tokens = 25;
    p.s.cd.metadata = own;
    p.s.cd.n_metadata = 5;
    play_says(&p, "a" DONE, LLMCB_REPLAY_KEEP);
    CHECK_INT(play_call(&p), LLMCB_OK);
    CHECK(strstr(p.t.labels, "ls_provider=openai,") != NULL);
    CHECK(strstr(p.t.labels, "ls_model_name=m,") != NULL);
    CHECK(strstr(p.t.labels, "ls_model_type=chat,") != NULL);
    CHECK(strstr(p.t.labels, "ls_max_tokens=25,") != NULL);
    CHECK(strstr(p.t.labels, "mine=y,") != NULL);
    CHECK(strstr(p.t.labels, "=x") == NULL);
    play_end(&p);
}

/* In lock step nobody is told more, also if there is more already, and the
 * server notices at once. */
TEST(case_072_a_failing_handler_ends_the_run)
{
    int gap;

    for (gap = 0; gap <= 50; gap += 50) {
        play p;
        rec *bad = rec_new("B", ASYNC);

        play_init(&p);
        bad->act = act_fail_token;
        bad->ms = 10;
        bad->h.flags = LLMCB_RAISE | LLMCB_AWAIT_EACH;
        p.r->h.flags = LLMCB_AWAIT_EACH;
        scene_add(&p.s, bad);
        scene_tape(&p.s, OK_HEAD, "a|b|c", gap, LLMCB_REPLAY_KEEP);
        CHECK_INT(play_call(&p), LLMCB_EHANDLER);
        CHECK_STR(bad->log, "start|a|error:EHANDLER");
        CHECK_STR(p.r->log, "start|a|error:EHANDLER");
        CHECK_INT(p.t.error.code, LLMCB_EHANDLER);
        CHECK_INT(p.t.error.handler_result, LLMCB_EJSON);
        CHECK(strstr(trace, "dropped") != NULL);
        CHECK_INT(p.s.spy.open, 0);
        CHECK_INT(llmcb_loop_now(p.s.loop), gap + 30);
        CHECK_REC(bad);
        play_end(&p);
        free(bad);
    }
}

/* ======== the protocol ==================================================== */

TEST(case_075_the_body_of_a_request)
{
    play p;

    play_init(&p);
    p.s.cd.base_url = "https://api.openai.com/v1";
    p.s.cd.api_key = "sk-test";
    p.s.cd.max_tokens = 25;
    play_says(&p, "a" DONE, LLMCB_REPLAY_KEEP);
    CHECK_INT(play_call(&p), LLMCB_OK);
    CHECK(strstr(p.s.spy.body, "\"model\":\"gpt-4o-mini\"") != NULL);
    CHECK(strstr(p.s.spy.body, "\"messages\":[{\"role\":\"user\","
                               "\"content\":\"hi\"}]") != NULL);
    CHECK(strstr(p.s.spy.body, "\"stream\":true") != NULL);
    CHECK(strstr(p.s.spy.body, "\"max_completion_tokens\":25") != NULL);
    CHECK(strstr(p.s.spy.body, "null") == NULL);
    play_end(&p);
}

/* LangChain's llm_output is null here; model and usage are told. */
TEST(case_076_a_usage_chunk_is_one_empty_token)
{
    play p;

    CHECK_INT(ask(&p,
                  "{\"model\":\"served\",\"choices\":[{\"index\":0,\"delta\":"
                  "{\"content\":\"a\"},\"finish_reason\":\"stop\"}]}|"
                  "{\"choices\":[],\"usage\":{\"prompt_tokens\":3,"
                  "\"completion_tokens\":4,\"total_tokens\":7}}|[DONE]",
                  LLMCB_REPLAY_KEEP),
              LLMCB_OK);
    CHECK_STR(p.r->log, "start|a||end");
    CHECK(p.t.usage.known);
    CHECK_INT(p.t.usage.input_tokens, 3);
    CHECK_INT(p.t.usage.output_tokens, 4);
    CHECK_INT(p.t.usage.total_tokens, 7);
    CHECK_STR(p.t.model, "served");
    play_end(&p);
}

#define CALL(id, arguments)                                              \
    "{\"choices\":[{\"index\":0,\"delta\":{\"tool_calls\":[{\"index\":0," \
    "\"id\":\"" id "\",\"function\":{\"name\":\"f\",\"arguments\":\""     \
    arguments "\"}}]}}]}"

TEST(case_078_one_index_and_two_ids_are_two_calls)
{
    play p;
    const llmcb_generation *g;

    CHECK_INT(ask(&p, CALL("x", "{}") "|" CALL("y", "{\\\"a\\\":1}") DONE,
                  LLMCB_REPLAY_KEEP),
              LLMCB_OK);
    g = first(&p);
    CHECK_INT(g->n_tool_calls, 2);
    if (g->n_tool_calls == 2) {
        CHECK_STR(g->tool_calls[0].id.ptr, "x");
        CHECK_STR(g->tool_calls[0].arguments.ptr, "{}");
        CHECK_STR(g->tool_calls[1].id.ptr, "y");
        CHECK_STR(g->tool_calls[1].arguments.ptr, "{\"a\":1}");
        CHECK(g->tool_calls[0].valid && g->tool_calls[1].valid);
    }
    play_end(&p);
}

TEST(case_080_a_finish_reason_that_is_sent_twice)
{
#define STOP \
    "|{\"model\":\"m\",\"choices\":[{\"index\":0,\"delta\":{}," \
    "\"finish_reason\":\"stop\"}]}"
    play p;

    CHECK_INT(ask(&p, "a" STOP STOP "|[DONE]", LLMCB_REPLAY_KEEP), LLMCB_OK);
    CHECK_STR(p.t.finish, "stop");
    CHECK_STR(p.t.model, "m");
    CHECK_STR(p.t.text, "a");
    play_end(&p);
}

TEST(case_081_a_streamed_refusal_is_kept)
{
#define REFUSAL(text) \
    "{\"choices\":[{\"index\":0,\"delta\":{\"refusal\":\"" text "\"}}]}"
    play p;

    CHECK_INT(ask(&p, REFUSAL("I ") "|" REFUSAL("can't.") DONE,
                  LLMCB_REPLAY_KEEP),
              LLMCB_OK);
    CHECK_STR(first(&p)->refusal.ptr, "I can't.");
    CHECK_STR(first(&p)->text.ptr, "");
    play_end(&p);
}

/* No delta: skipped. No choices: as if there were none, so that only usage
 * makes a token of it. No content: "". */
TEST(case_082_nulls_are_skipped_or_empty)
{
#define USAGE "\"usage\":{\"total_tokens\":7}"
    static const char *const rows[][2] = {
        { "\"choices\":[{\"index\":0,\"delta\":null}]", "start|a|b||end" },
        { "\"choices\":null", "start|a|b||end" },
        { "\"choices\":[]", "start|a|b||end" },
        { "\"choices\":null," USAGE, "start|a||b||end" },
        { "\"choices\":[]," USAGE, "start|a||b||end" },
        { "\"choices\":[{\"index\":0,\"delta\":{\"content\":null}}]",
          "start|a||b||end" },
    };
    size_t i;

    for (i = 0; i < sizeof rows / sizeof *rows; i++) {
        char pieces[256];
        play p;

        snprintf(pieces, sizeof pieces, "a|{%s}|b" DONE, rows[i][0]);
        CHECK_INT(ask(&p, pieces, LLMCB_REPLAY_KEEP), LLMCB_OK);
        CHECK_STR(p.r->log, rows[i][1]);
        CHECK_STR(p.t.text, "ab");
        play_end(&p);
    }
}

/* 500, 500, 200. */
static void fail_twice(play *p)
{
    play_init(p);
    play_sends(p, FAIL("500", ""), LLMCB_REPLAY_KEEP);
    play_sends(p, FAIL("500", ""), LLMCB_REPLAY_KEEP);
    play_says(p, "a" DONE, LLMCB_REPLAY_KEEP);
    CHECK_INT(play_call(p), LLMCB_OK);
    CHECK_INT(p->s.spy.requests, 3);
}

TEST(case_083_two_retries_and_their_delays)
{
    int i;

    for (i = 0; i < 20; i++) { /* the delays are random */
        int64_t d1, d2;
        play p;

        fail_twice(&p);
        d1 = asked_at[1] - asked_at[0];
        d2 = asked_at[2] - asked_at[1];
        CHECK(d1 >= 370 && d1 <= 500);
        CHECK(d2 >= 750 && d2 <= 1000);
        CHECK_INT(p.r->starts, 1);
        CHECK_INT(p.r->finishes, 1);
        CHECK(strstr(p.r->log, "|a||end") != NULL);
        play_end(&p);
    }
}

TEST(case_084_retries_are_told)
{
    play p;
    int i;

    fail_twice(&p);
    CHECK_STR(p.r->log, "start|retry:1|retry:2|a||end");
    CHECK_INT(p.t.n_retries, 2);
    for (i = 0; i < 2; i++) {
        CHECK_INT(p.t.retry[i].attempt, i + 1);
        CHECK_INT(p.t.retry[i].status, 500);
        CHECK_INT(p.t.retry[i].delay, asked_at[i + 1] - asked_at[i]);
    }
    play_end(&p);
}

TEST(case_085_retry_after_is_obeyed)
{
    play p;

    play_init(&p);
    play_sends(&p, FAIL("429", "Retry-After: 1\r\n"), LLMCB_REPLAY_KEEP);
    play_says(&p, "a" DONE, LLMCB_REPLAY_KEEP);
    CHECK_INT(play_call(&p), LLMCB_OK);
    CHECK_INT(p.s.spy.requests, 2);
    CHECK_INT(asked_at[1] - asked_at[0], 1000);
    play_end(&p);
}

TEST(case_086_a_bad_request_is_not_repeated)
{
    play p;

    play_init(&p);
    play_sends(&p, FAIL("400", ""), LLMCB_REPLAY_KEEP);
    CHECK_INT(play_call(&p), LLMCB_EHTTP);
    CHECK_INT(p.s.spy.requests, 1);
    CHECK_STR(p.r->log, "start|error:EHTTP");
    play_end(&p);
}

TEST(case_087_an_error_within_a_stream)
{
    play p;

    CHECK_INT(ask(&p, "a|b|{\"error\":{\"message\":\"no luck\",\"type\":"
                      "\"server_error\"}}",
                  LLMCB_REPLAY_KEEP),
              LLMCB_EAPI);
    CHECK_STR(p.r->log, "start|a|b|error:EAPI");
    CHECK(strstr(p.t.error.message, "no luck") != NULL);
    CHECK_STR(p.t.error.type, "server_error");
    CHECK_INT(p.s.spy.requests, 1);
    play_end(&p);
}

TEST(case_088_a_stream_that_just_ends)
{
    play p;

    CHECK_INT(ask(&p, "a|b", LLMCB_REPLAY_CLOSE), LLMCB_ETRUNCATED);
    CHECK_STR(p.r->log, "start|a|b|error:ETRUNCATED");
    CHECK_STR(p.t.text, "ab");
    CHECK(!llmcb_op_result(p.op)->complete);
    CHECK_STR(first(&p)->text.ptr, "ab");
    play_end(&p);
}

/* A chunk that says 256 bytes and has fewer. */
TEST(case_089_a_connection_dropped_inside_a_chunk)
{
    static const struct {
        llmcb_replay_end end;
        llmcb_code code;
        const char *log;
    } rows[] = {
        { LLMCB_REPLAY_RESET, LLMCB_EIO, "start|a|error:EIO" },
        { LLMCB_REPLAY_CLOSE, LLMCB_ETRUNCATED, "start|a|error:ETRUNCATED" },
    };
    size_t i;

    for (i = 0; i < 2; i++) {
        play p;

        play_init(&p);
        play_sends(&p,
                   "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                   "Transfer-Encoding: chunked\r\n\r\n100\r\n"
                   "data: {\"choices\":[{\"index\":0,\"delta\":"
                   "{\"content\":\"a\"}}]}\n\ndata: {\"choi",
                   rows[i].end);
        CHECK_INT(play_call(&p), rows[i].code);
        CHECK_STR(p.r->log, rows[i].log);
        CHECK_STR(p.t.text, "a");
        CHECK_INT(p.s.spy.requests, 1);
        play_end(&p);
    }
}

TEST(case_090_no_answer_within_the_time)
{
    play p;

    play_init(&p);
    p.s.cd.first_byte_ms = 2000;
    play_sends(&p, "", LLMCB_REPLAY_KEEP);
    CHECK_INT(play_call(&p), LLMCB_ETIMEDOUT);
    CHECK_INT(p.s.spy.requests, 3);
    CHECK_INT(p.t.error.detail, LLMCB_DETAIL_FIRST_BYTE);
    CHECK_INT(p.t.error.attempt, 3);
    CHECK_STR(p.r->log, "start|retry:1|retry:2|error:ETIMEDOUT");
    CHECK_INT(llmcb_loop_now(p.s.loop) - asked_at[2], 2000);
    play_end(&p);
}

/* A comment each second, behind a token at once or none: time is counted from
 * the token, or else from the first byte of the body, and from nothing
 * later. */
TEST(case_091_comments_are_no_sign_of_life)
{
    int token;

    for (token = 0; token < 2; token++) {
        char bytes[1024];
        llmcb_segment segments[32];
        size_t i, n;
        play p;

        n = (size_t)snprintf(bytes, sizeof bytes, "%s", OK_HEAD);
        if (token) n += events_text(bytes + n, "a", NULL, NULL);
        memset(segments, 0, sizeof segments);
        for (i = 1; i < 32; i++) {
            segments[i].offset = n;
            segments[i].delay_ms = 1000;
            strcpy(bytes + n, ": keep-alive\n\n");
            n += 14;
        }
        play_init(&p);
        p.s.cd.idle_ms = 5000;
        p.s.cd.max_retries = -1;
        play_sends(&p, bytes, LLMCB_REPLAY_KEEP);
        p.s.tapes[0].segments = segments;
        p.s.tapes[0].n_segments = 32;
        CHECK_INT(play_call(&p), LLMCB_ETIMEDOUT);
        CHECK_INT(p.t.error.detail, LLMCB_DETAIL_IDLE);
        CHECK_INT(llmcb_loop_now(p.s.loop), token ? 5000 : 6000);
        CHECK_STR(p.r->log, token ? "start|a|error:ETIMEDOUT"
                                  : "start|error:ETIMEDOUT");
        play_end(&p);
    }
}

/* The same events in other clothes: the ends of lines, comments, data in two
 * lines, no blank behind the colon. */
typedef struct clothes {
    const char *eol, *comment, *data, *within;
} clothes;

static void dress(char *out, const clothes *c)
{
    static const char *const events[][2] = {
        { "{\"model\":\"m\",\"choices\":[{\"index\":0,",
          "\"delta\":{\"content\":\"W\xC3\xA9\"}}]}" },
        { "{\"choices\":[{\"index\":0,",
          "\"delta\":{\"content\":\"b\"},\"finish_reason\":\"stop\"}]}" },
        { "{\"choices\":[],\"usage\":{\"prompt_tokens\":3,",
          "\"completion_tokens\":4,\"total_tokens\":7}}" },
    };
    size_t i, n = (size_t)sprintf(out, "%s", OK_HEAD);

    for (i = 0; i < 3; i++)
        n += (size_t)sprintf(out + n, "%s%s%s%s%s%s%s%s", c->comment,
                             *c->comment ? c->eol : "", c->data, events[i][0],
                             c->within, events[i][1], c->eol, c->eol);
    sprintf(out + n, "%s[DONE]%s%s", c->data, c->eol, c->eol);
}

TEST(case_092_a_stream_cut_at_every_byte)
{
    static const clothes rows[] = {
        { "\n", "", "data: ", "" },
        { "\r\n", "", "data: ", "" },
        { "\r", "", "data: ", "" },
        { "\n", ": ping", "data: ", "" },
        { "\n", "", "data: ", "\ndata: " },
        { "\n", "", "data:", "" },
        { "\r\n", ":", "data:", "\r\ndata:" },
    };
    llmcb_segment segments[1024];
    char bytes[1024];
    size_t i, k;
    int cut;

    for (i = 0; i < sizeof rows / sizeof *rows; i++)
        for (cut = 0; cut < 2; cut++) {
            play p;

            dress(bytes, &rows[i]);
            play_init(&p);
            play_sends(&p, bytes, LLMCB_REPLAY_KEEP);
            for (k = 0; bytes[k]; k++) {
                segments[k].offset = k;
                segments[k].delay_ms = 1;
            }
            if (cut) {
                p.s.tapes[0].segments = segments;
                p.s.tapes[0].n_segments = k;
            }
            CHECK_INT(play_call(&p), LLMCB_OK);
            CHECK_STR(p.r->log, "start|W\xC3\xA9|b||end");
            CHECK_STR(p.t.text, "W\xC3\xA9" "b");
            CHECK_STR(p.t.finish, "stop");
            CHECK_STR(p.t.model, "m");
            CHECK_INT(p.t.usage.total_tokens, 7);
            play_end(&p);
        }
}

TEST(case_093_done_ends_a_stream_that_stays_open)
{
    play p;

    CHECK_INT(ask(&p, "a" DONE, LLMCB_REPLAY_KEEP), LLMCB_OK);
    CHECK_STR(p.r->log, "start|a||end");
    CHECK_INT(llmcb_loop_now(p.s.loop), 0);
    CHECK(llmcb_op_result(p.op)->sentinel);
    play_end(&p);
}

TEST(case_094_an_error_body_with_status_200)
{
    play p;

    play_init(&p);
    p.s.cd.streaming = false;
    play_sends(&p, JSON_HEAD "{\"error\":{\"message\":\"no luck\",\"type\":"
                             "\"t\",\"code\":\"c\"}}",
               LLMCB_REPLAY_CLOSE);
    CHECK_INT(play_call(&p), LLMCB_EAPI);
    CHECK_STR(p.r->log, "start|error:EAPI");
    CHECK(strstr(p.t.error.message, "no luck") != NULL);
    CHECK_STR(p.t.error.type, "t");
    CHECK_STR(p.t.error.provider_code, "c");
    play_end(&p);
}

/* LangChain fails here. */
TEST(case_095_a_whole_answer_where_a_stream_was_asked)
{
    play p;

    play_init(&p);
    play_sends(&p, JSON_HEAD "{\"choices\":[{\"message\":{\"content\":"
                             "\"Why\"},\"finish_reason\":\"stop\"}]}",
               LLMCB_REPLAY_CLOSE);
    CHECK_INT(play_call(&p), LLMCB_OK);
    CHECK_STR(p.r->log, "start|Why|end");
    CHECK_STR(p.t.text, "Why");
    CHECK_STR(p.t.finish, "stop");
    play_end(&p);
}

int main(int argc, char **argv)
{
    return scene_main(argc, argv);
}

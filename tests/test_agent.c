/* Tools and the agent loop: the tree of events, the answers that go back to
 * the model, arguments, approval, failures, limits, cancels, memory. Time is
 * virtual, the model's answers are recordings; what must be slow waits at a
 * gate. */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include <stdlib.h>

/* Numbers are read as in a locale that has this for a point: few machines
 * have one installed. */
static const char *locale_point = ".";
static double local_strtod(const char *s, char **end);
#define strtod(s, end) local_strtod(s, end)
#include "scene.h"

/* What takes long and has little to do with threads takes larger steps. */
#if defined(__SANITIZE_THREAD__)
#define STRIDE 5
#else
#define STRIDE 1
#endif
#undef strtod

static double local_strtod(const char *s, char **end)
{
    char plain[500];
    size_t n = strspn(s, "+-0123456789"), skip = 0;
    double v;

    if (!strcmp(locale_point, ".")) return strtod(s, end);
    memcpy(plain, s, n);
    if (!strncmp(s + n, locale_point, strlen(locale_point))) {
        skip = strlen(locale_point) - 1;
        plain[n] = '.';
        strcpy(plain + n + 1, s + n + 1 + skip);
    } else if (s[n] == 'e' || s[n] == 'E') {
        strcpy(plain + n, s + n);
    } else {
        plain[n] = '\0';
        skip = 0;
    }
    v = strtod(plain, end);
    *end = (char *)(uintptr_t)s + (*end - plain);
    if (*end > s + n) *end += skip;
    return v;
}

/* ---- the witness: a handler of all events that checks what it is told ---- */

typedef struct seen_run {
    char id[37], parent[37], name[40], tag[24];
    llmcb_event_kind start, finish;
    llmcb_code code;
    uint64_t seq;
    int64_t from, to;
    bool inside, finished;
} seen_run;

typedef struct wit {
    llmcb_handler h; /* first */
    int64_t ms;      /* what an async event takes */
    int (*act)(struct wit *w, const llmcb_event *ev);
    llmcb_event_kind at; /* for act */
    int result;
    llmcb_op **op;
    gate *gate;
    pthread_mutex_t m;
    seen_run runs[800];
    size_t n;
    unsigned count[LLMCB_N_EVENTS], events, acted;
    uint64_t skipped;
    char log[65536];
    size_t len;
    const char *wrong;
    bool given_up; /* runs may stay without their end */
} wit;

static void read_str(wit *w, llmcb_str s)
{
    volatile unsigned char sum = 0; /* the bytes are read for ASan */
    size_t i;

    if (!s.ptr) {
        w->wrong = "a string is NULL";
        return;
    }
    for (i = 0; i < s.len; i++) sum = (unsigned char)(sum ^ s.ptr[i]);
    (void)sum;
    if (s.ptr[s.len]) w->wrong = "no NUL behind a string";
}

static void read_event(wit *w, const llmcb_event *ev)
{
    if (ev->start) {
        read_str(w, ev->start->input);
        read_str(w, ev->start->prompt);
        read_str(w, ev->start->params);
        read_str(w, ev->start->tool_call_id);
        read_str(w, llmcb_text(ev->start->description));
        if (!ev->start->description) w->wrong = "no description";
    }
    if (ev->output) {
        read_str(w, ev->output->text);
        read_str(w, ev->output->log);
    }
    if (ev->action) {
        read_str(w, ev->action->tool);
        read_str(w, ev->action->input);
        read_str(w, ev->action->log);
        read_str(w, ev->action->tool_call_id);
    }
    if (ev->data) read_str(w, ev->data->text);
    if (ev->token) read_str(w, ev->token->text);
    if (ev->error && !*ev->error->message) w->wrong = "no message";
}

static bool ends(llmcb_event_kind k)
{
    return k == LLMCB_LLM_END || k == LLMCB_LLM_ERROR ||
           k == LLMCB_CHAIN_END || k == LLMCB_CHAIN_ERROR ||
           k == LLMCB_TOOL_END || k == LLMCB_TOOL_ERROR;
}

static seen_run *run_with(wit *w, const char *id)
{
    size_t i;

    for (i = 0; i < w->n; i++)
        if (!strcmp(w->runs[i].id, id)) return &w->runs[i];
    return NULL;
}

/* The n-th run of that name. */
static seen_run *run_named(wit *w, const char *name, size_t n)
{
    static seen_run none;
    size_t i;

    for (i = 0; i < w->n; i++)
        if (!strcmp(w->runs[i].name, name) && n-- == 0) return &w->runs[i];
    return &none;
}

static void wit_word(wit *w, const llmcb_event *ev)
{
    char *at = w->log + w->len;
    size_t room = sizeof w->log - w->len;
    const char *kind = llmcb_event_name(ev->kind) + 3;
    int n;

    if (ev->kind == LLMCB_LLM_NEW_TOKEN || room < 2000) return;
    if (ev->error)
        n = snprintf(at, room, "%s:%s=%s ", kind, ev->run->name,
                     llmcb_code_name(ev->error->code) + 6);
    else if (ev->kind == LLMCB_TOOL_END)
        n = snprintf(at, room, "%s:%s%s%.400s ", kind, ev->run->name,
                     ev->output->failed ? "!" : "=", ev->output->text.ptr);
    else if (ev->output)
        n = snprintf(at, room, "%s:%s ", kind, ev->run->name);
    else if (ev->action)
        n = snprintf(at, room, "%s:%s(%.400s) ", kind, ev->action->tool.ptr,
                     ev->action->input.ptr);
    else if (ev->kind == LLMCB_TOOL_START)
        n = snprintf(at, room, "%s:%s(%.400s) ", kind, ev->run->name,
                     ev->start->input.ptr);
    else if (ev->kind == LLMCB_CUSTOM_EVENT)
        n = snprintf(at, room, "%s:%s=%.100s ", kind, ev->data->name.ptr,
                     ev->data->text.ptr);
    else
        n = snprintf(at, room, "%s:%s ", kind, ev->run->name);
    w->len += (size_t)n;
}

static void wit_enter(wit *w, const llmcb_event *ev)
{
    seen_run *r;

    pthread_mutex_lock(&w->m);
    read_event(w, ev);
    w->events++;
    w->count[ev->kind]++;
    w->skipped += ev->skipped;
    r = run_with(w, ev->run->id);
    if (!r && w->n < sizeof w->runs / sizeof *w->runs) {
        r = &w->runs[w->n++];
        if (!ev->start) w->wrong = "a run without a start";
        strcpy(r->id, ev->run->id);
        strcpy(r->parent, ev->run->parent_id);
        snprintf(r->name, sizeof r->name, "%s", ev->run->name);
        snprintf(r->tag, sizeof r->tag, "%s",
                 ev->run->n_tags ? ev->run->tags[ev->run->n_tags - 1] : "");
        r->start = ev->kind;
        r->from = ev->run->started_ms;
        if (*r->parent) {
            const seen_run *p = run_with(w, r->parent);
            if (p && p->finished) w->wrong = "a child of a finished run";
        }
    } else if (r && ev->start) {
        w->wrong = "two starts";
    }
    if (r) {
        size_t i;
        if (r->inside) w->wrong = "two events of a run at once";
        if (r->finished) w->wrong = "an event after the finish";
        if (ev->seq <= r->seq) w->wrong = "out of order";
        r->seq = ev->seq;
        r->inside = true;
        if (ends(ev->kind)) {
            r->finished = true;
            r->finish = ev->kind;
            r->to = ev->run->finished_ms;
            r->code = ev->error ? ev->error->code : LLMCB_OK;
            for (i = 0; i < w->n; i++)
                if (!strcmp(w->runs[i].parent, r->id) && !w->runs[i].finished)
                    w->wrong = "a run ends before its child";
        }
    }
    wit_word(w, ev);
    pthread_mutex_unlock(&w->m);
}

static int wit_leave(wit *w, const llmcb_event *ev)
{
    int result = w->act ? w->act(w, ev) : 0;
    seen_run *r;

    pthread_mutex_lock(&w->m);
    read_event(w, ev); /* the payload is still there */
    r = run_with(w, ev->run->id);
    if (r) r->inside = false;
    pthread_mutex_unlock(&w->m);
    return result;
}

static int wit_sync(llmcb_handler *h, const llmcb_event *ev)
{
    wit *w = (wit *)(void *)h;

    wit_enter(w, ev);
    if (w->gate && ev->kind == w->at) gate_pass(w->gate);
    return wit_leave(w, ev);
}

static llmcb_step wit_async(llmcb_task *t, llmcb_handler *h,
                            const llmcb_event *ev)
{
    wit *w = (wit *)(void *)h;

    LLMCB_BEGIN(t);
    wit_enter(w, ev);
    if (w->ms) LLMCB_AWAIT(t, llmcb_sleep(t, w->ms));
    return wit_leave(w, ev);
    LLMCB_END(t);
}

static wit *wit_new(mode m)
{
    wit *w = (wit *)calloc(1, sizeof *w);
    llmcb_sync_fn sync[LLMCB_N_EVENTS];
    llmcb_async_fn async[LLMCB_N_EVENTS];
    int i;

    if (!w) abort();
    for (i = 0; i < LLMCB_N_EVENTS; i++) {
        sync[i] = wit_sync;
        async[i] = wit_async;
    }
    if (m == ASYNC)
        memcpy(&w->h.async, async, sizeof async);
    else
        memcpy(&w->h.sync, sync, sizeof sync);
    if (m == INLINE) w->h.flags = LLMCB_INLINE;
    pthread_mutex_init(&w->m, NULL);
    return w;
}

static unsigned wit_open(const wit *w)
{
    unsigned open = 0;
    size_t i;

    for (i = 0; i < w->n; i++) open += !w->runs[i].finished;
    return open;
}

#define CHECK_WIT(w)                                                     \
    do {                                                                 \
        if ((w)->wrong) TEST_FAIL("%s: %.400s", (w)->wrong, (w)->log);   \
        if (wit_open(w) && !(w)->given_up)                               \
            TEST_FAIL("%u runs never ended: %.900s", wit_open(w),        \
                      (w)->log);                                         \
    } while (0)

/* ---- the stage: a scene with an agent ------------------------------------ */

typedef struct stage {
    scene s;
    char *bodies[64];
    unsigned n_bodies;
    llmcb_tool tools[8];
    llmcb_agent_desc ad;
    llmcb_config config;
    llmcb_handler *callbacks[4];
    wit *w;
    llmcb_op *op;
    /* What tools did. */
    pthread_mutex_t m;
    char done[8192]; /* name(arguments) of each call */
    size_t done_len;
    gate gate;
} stage;

static stage *on_stage;

static llmcb_code stage_start(llmcb_transport *tr, llmcb_exchange *x,
                              const llmcb_request *q)
{
    stage *st = on_stage;
    char *copy = (char *)malloc(q->body_len + 1);

    if (!copy) abort();
    memcpy(copy, q->body, q->body_len);
    copy[q->body_len] = '\0';
    if (st->n_bodies < 64)
        st->bodies[st->n_bodies++] = copy;
    else
        free(copy);
    return spy_start(tr, x, q);
}

static const char *body(const stage *st, unsigned i)
{
    return i < st->n_bodies ? st->bodies[i] : "";
}

static void did(const llmcb_tool_use *use)
{
    stage *st = on_stage;

    pthread_mutex_lock(&st->m);
    if (st->done_len < sizeof st->done - 500)
        st->done_len += (size_t)snprintf(
            st->done + st->done_len, 500, "%s(%.300s) ", use->tool->name,
            use->arguments.ptr);
    pthread_mutex_unlock(&st->m);
}

/* -- tools */

static llmcb_step add_step(llmcb_task *t, llmcb_tool_use *use)
{
    char text[60];
    double a = 0, b = 0;

    (void)t;
    did(use);
    if (!llmcb_tool_number(use, "a", &a) || !llmcb_tool_number(use, "b", &b))
        return llmcb_tool_fail(use, "two numbers are needed");
    snprintf(text, sizeof text, "%g", a + b);
    return llmcb_tool_answer(use, llmcb_text(text));
}

static int add_call(llmcb_tool_use *use)
{
    return add_step(NULL, use);
}

/* Sleeps "ms" and answers that it has. */
static llmcb_step nap_step(llmcb_task *t, llmcb_tool_use *use)
{
    char text[60];
    int64_t ms = 0;

    LLMCB_BEGIN(t);
    did(use);
    if (!llmcb_tool_int(use, "ms", &ms)) ms = 5;
    LLMCB_AWAIT(t, llmcb_sleep(t, ms));
    if (t->result != LLMCB_OK) return t->result;
    if (!llmcb_tool_int(use, "ms", &ms)) ms = 5;
    snprintf(text, sizeof text, "slept %d", (int)ms);
    return llmcb_tool_answer(use, llmcb_text(text));
    LLMCB_END(t);
}

static int gate_call(llmcb_tool_use *use)
{
    did(use);
    gate_pass(&on_stage->gate);
    return llmcb_tool_answer(use, llmcb_text("passed"));
}

static int echo_call(llmcb_tool_use *use)
{
    did(use);
    return llmcb_tool_answer(use, use->arguments);
}

static llmcb_step echo_step(llmcb_task *t, llmcb_tool_use *use)
{
    (void)t;
    return echo_call(use);
}

#define OBJ "{\"type\":\"object\"}"
static const llmcb_tool add_tool = { "add", "a + b",
    "{\"type\":\"object\",\"required\":[\"a\",\"b\"],\"properties\":{"
    "\"a\":{\"type\":\"number\"},\"b\":{\"type\":\"number\"}}}",
    NULL, add_step, 0, 0, false, NULL };
static const llmcb_tool nap_tool = { "slow", "sleeps", OBJ, NULL, nap_step, 0,
                                     0, false, NULL };
static const llmcb_tool gate_tool = { "gate", "waits", OBJ, gate_call, NULL,
                                      0, 0, false, NULL };
static const llmcb_tool echo_tool = { "echo", NULL, NULL, NULL, echo_step, 0,
                                      0, false, NULL };

/* -- the model's answers */

#define TC(i, id, name, args)                                             \
    "{\"choices\":[{\"index\":0,\"delta\":{\"tool_calls\":[{\"index\":" i \
    ",\"id\":\"" id "\",\"type\":\"function\",\"function\":{\"name\":\""  \
    name "\",\"arguments\":\"" args "\"}}]}}]}"
#define TCEND                                             \
    "|{\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":" \
    "\"tool_calls\"}]}"                                   \
    "|{\"choices\":[],\"usage\":{\"prompt_tokens\":3,"    \
    "\"completion_tokens\":2,\"total_tokens\":5}}|[DONE]"
#define SAYS(text)                                     \
    text "|$|{\"choices\":[],\"usage\":{\"prompt_tokens\":7," \
         "\"completion_tokens\":4,\"total_tokens\":11}}|[DONE]"
#define JSON_HEAD "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"

static void stage_init(stage *st, mode m)
{
    memset(st, 0, sizeof *st);
    scene_init(&st->s);
    pthread_mutex_init(&st->m, NULL);
    pthread_mutex_init(&st->gate.m, NULL);
    pthread_cond_init(&st->gate.c, NULL);
    st->tools[0] = add_tool;
    st->tools[1] = nap_tool;
    st->tools[2] = gate_tool;
    st->tools[3] = echo_tool;
    st->ad.tools = st->tools;
    st->ad.n_tools = 4;
    st->w = wit_new(m);
    st->w->op = &st->op;
    st->callbacks[0] = &st->w->h;
    st->config.callbacks = st->callbacks;
    st->config.n_callbacks = 1;
    on_stage = st;
}

static void says(stage *st, const char *pieces)
{
    scene_tape(&st->s, OK_HEAD, pieces, 0, LLMCB_REPLAY_KEEP);
}

static bool stage_open(stage *st)
{
    if (!scene_open(&st->s)) return false;
    st->s.spy.base.start = stage_start;
    st->ad.chat = st->s.chat;
    return true;
}

static llmcb_op *ask(stage *st)
{
    llmcb_message m;

    memset(&m, 0, sizeof m);
    m.content = "hi";
    return llmcb_agent_start(&st->ad, &m, 1, &st->config);
}

static void stage_close(stage *st)
{
    unsigned i;

    scene_close(&st->s);
    CHECK_WIT(st->w);
    for (i = 0; i < st->n_bodies; i++) free(st->bodies[i]);
    free(st->w);
}

/* Opens, runs an agent to its end. */
static llmcb_code perform(stage *st)
{
    if (!stage_open(st)) abort();
    st->op = ask(st);
    return llmcb_op_wait(st->op);
}

static void finish(stage *st)
{
    llmcb_op_free(st->op);
    st->op = NULL;
    stage_close(st);
}

/* Reads all that an op of an agent has to show. */
static void read_op(const llmcb_op *op)
{
    wit *w = wit_new(INLINE);
    size_t i, k, n = 0;
    const llmcb_message *m = llmcb_agent_messages(op, &n);

    read_str(w, llmcb_op_output(op)->text);
    for (i = 0; m && i < n; i++) {
        llmcb_str s = { m[i].content, m[i].content_len };
        if (!s.ptr) s.ptr = "";
        read_str(w, s);
        for (k = 0; k < m[i].n_tool_calls; k++) {
            if (!m[i].tool_calls) {
                w->wrong = "no tool_calls";
                break;
            }
            read_str(w, m[i].tool_calls[k].id);
            read_str(w, m[i].tool_calls[k].name);
            read_str(w, m[i].tool_calls[k].arguments);
        }
        if (m[i].role == LLMCB_TOOL && !m[i].tool_call_id)
            w->wrong = "no tool_call_id";
    }
    if (w->wrong) TEST_FAIL("op: %s", w->wrong);
    if (!*llmcb_op_error(op)->message) TEST_FAIL("no message");
    free(w);
}

#define TWO_TOOLS                                                  \
    TC("0", "c1", "slow", "{\\\"ms\\\":30}") "|"                   \
    TC("1", "c2", "slow", "{\\\"ms\\\":10}") TCEND

/* ---- the tree ------------------------------------------------------------ */

/* The order for one handler; two runs that are alike do not differ in it. */
#define CHAIN(tools)                                                       \
    "chain_start:AgentExecutor chain_start:RunnableSequence "              \
    "text:RunnableSequence chat_model_start:ChatOpenAI "                   \
    "llm_end:ChatOpenAI chain_end:RunnableSequence " tools                 \
    "chain_start:RunnableSequence text:RunnableSequence "                  \
    "chat_model_start:ChatOpenAI llm_end:ChatOpenAI "                      \
    "chain_end:RunnableSequence agent_finish:AgentExecutor "               \
    "chain_end:AgentExecutor "

TEST(case_098_tree_of_two_tools)
{
    static const mode modes[] = { INLINE, ASYNC, SYNC };
    int k, streaming;

    for (k = 0; k < 3; k++)
        for (streaming = 0; streaming < 2; streaming++) {
            stage st;
            wit *w;
            seen_run *root, *a, *b;
            const char *log;

            stage_init(&st, modes[k]);
            st.s.cd.streaming = streaming;
            if (k == 1) st.w->ms = 1;
            says(&st, TWO_TOOLS);
            says(&st, SAYS("do|ne"));
            CHECK_INT(perform(&st), LLMCB_OK);
            w = st.w;
            log = w->log;
            CHECK_STR(llmcb_op_output(st.op)->text.ptr, "done");
            if (modes[k] == INLINE)
                CHECK_STR(log, CHAIN("agent_action:slow({\"ms\":30}) "
                                     "agent_action:slow({\"ms\":10}) "
                                     "tool_start:slow({\"ms\":30}) "
                                     "tool_start:slow({\"ms\":10}) "
                                     "tool_end:slow=slept 10 "
                                     "tool_end:slow=slept 30 "));
            CHECK_INT(w->n, 7);
            root = run_named(w, "AgentExecutor", 0);
            a = run_named(w, "slow", 0);
            b = run_named(w, "slow", 1);
            CHECK_STR(root->parent, "");
            CHECK_STR(a->parent, root->id);
            CHECK_STR(b->parent, root->id);
            CHECK_STR(run_named(w, "RunnableSequence", 0)->parent, root->id);
            CHECK_STR(run_named(w, "RunnableSequence", 1)->parent, root->id);
            CHECK_STR(run_named(w, "ChatOpenAI", 0)->parent,
                      run_named(w, "RunnableSequence", 0)->id);
            CHECK_STR(run_named(w, "ChatOpenAI", 1)->parent,
                      run_named(w, "RunnableSequence", 1)->id);
            CHECK_STR(run_named(w, "ChatOpenAI", 0)->tag, "seq:step:1");
            CHECK_STR(root->tag, "");
            CHECK_STR(a->tag, "");
            CHECK_INT(root->start, LLMCB_CHAIN_START);
            CHECK_INT(a->start, LLMCB_TOOL_START);
            /* they overlap, and end in another order than they began */
            CHECK(a->from < b->to && b->from < a->to);
            CHECK(a->to != b->to);
            CHECK(strstr(log, "agent_action:slow({\"ms\":10})") <
                  strstr(log, "tool_start:"));
            /* the answers go back in the order of the calls */
            CHECK(strstr(body(&st, 1),
                         "{\"role\":\"tool\",\"content\":\"slept 30\","
                         "\"tool_call_id\":\"c1\"},"
                         "{\"role\":\"tool\",\"content\":\"slept 10\","
                         "\"tool_call_id\":\"c2\"}") != NULL);
            finish(&st);
        }
}

/* Many tools that end in every order, blocking ones among them. */
TEST(answers_in_call_order)
{
    static const char *const ms[4] = { "40", "10", "30", "20" };
    char pieces[4000] = "", want[100];
    const char *at;
    stage st;
    int i;

    stage_init(&st, SYNC);
    for (i = 0; i < 8; i++)
        sprintf(pieces + strlen(pieces),
                i % 2 ? TC("%d", "k%d", "slow", "{\\\"ms\\\":%s}") "|"
                      : TC("%d", "k%d", "add", "{\\\"a\\\":1,\\\"b\\\":%s}")
                        "|",
                i, i, ms[i / 2]);
    strcat(pieces, &TCEND[1]);
    st.tools[0].step = NULL;
    st.tools[0].call = add_call;
    says(&st, pieces);
    says(&st, SAYS("ok"));
    CHECK_INT(perform(&st), LLMCB_OK);
    CHECK_INT(st.w->count[LLMCB_TOOL_END], 8);
    for (i = 0, at = body(&st, 1); i < 8 && at; i++) {
        sprintf(want, i % 2 ? "\"content\":\"slept %d\",\"tool_call_id\":"
                              "\"k%d\"}"
                            : "\"content\":\"%d\",\"tool_call_id\":\"k%d\"}",
                atoi(ms[i / 2]) + !(i % 2), i);
        at = strstr(at, want);
        if (!at) TEST_FAIL("no %s in %s", want, body(&st, 1));
    }
    finish(&st);
}

#define ONE_TOOL TC("0", "c1", "add", "{\\\"a\\\":40,\\\"b\\\":2}") TCEND

TEST(counts_of_one_tool_and_two_turns)
{
    static const mode modes[] = { INLINE, ASYNC, SYNC };
    int k;

    for (k = 0; k < 3; k++) {
        stage st;
        wit *own = wit_new(modes[k]), *w;

        stage_init(&st, modes[k]);
        st.s.handlers[st.s.n_handlers++] = &own->h;
        says(&st, ONE_TOOL);
        says(&st, SAYS("It is| 42"));
        CHECK_INT(perform(&st), LLMCB_OK);
        w = st.w;
        CHECK_INT(w->count[LLMCB_CHAIN_START], 3);
        CHECK_INT(w->count[LLMCB_CHAIN_END], 3);
        CHECK_INT(w->count[LLMCB_CHAIN_ERROR], 0);
        CHECK_INT(w->count[LLMCB_CHAT_MODEL_START], 2);
        CHECK_INT(w->count[LLMCB_LLM_END], 2);
        CHECK_INT(w->count[LLMCB_LLM_ERROR], 0);
        CHECK_INT(w->count[LLMCB_TOOL_START], 1);
        CHECK_INT(w->count[LLMCB_TOOL_END], 1);
        CHECK_INT(w->count[LLMCB_TOOL_ERROR], 0);
        CHECK_INT(w->count[LLMCB_AGENT_ACTION], 1);
        CHECK_INT(w->count[LLMCB_AGENT_FINISH], 1);
        CHECK_INT(w->count[LLMCB_TEXT], 2);
        CHECK_INT(w->count[LLMCB_RETRIEVER_START], 0);
        CHECK_INT(own->count[LLMCB_CHAT_MODEL_START], 2);
        CHECK_INT(own->count[LLMCB_LLM_END], 2);
        CHECK_INT(own->events, 4 + own->count[LLMCB_LLM_NEW_TOKEN]);
        CHECK_WIT(own);
        CHECK(strstr(w->log, "tool_end:add=42 ") != NULL);
        finish(&st);
        free(own);
    }
}

/* What the op shows: output, messages, usage, result, run. */
TEST(what_an_agent_brings)
{
    stage st;
    size_t n = 99;
    const llmcb_message *m;
    llmcb_usage u;
    int streaming;

    for (streaming = 0; streaming < 2; streaming++) {
        stage_init(&st, INLINE);
        st.s.cd.streaming = streaming;
        if (streaming) {
            says(&st, "Let me| see|" ONE_TOOL);
            says(&st, SAYS("It is| 42"));
        } else {
            scene_tape(&st.s,
                       JSON_HEAD "{\"choices\":[{\"index\":0,\"message\":{"
                       "\"role\":\"assistant\",\"content\":\"Let me see\","
                       "\"tool_calls\":[{\"id\":\"c1\",\"type\":\"function\","
                       "\"function\":{\"name\":\"add\",\"arguments\":"
                       "\"{\\\"a\\\":40,\\\"b\\\":2}\"}}]},"
                       "\"finish_reason\":\"tool_calls\"}],\"usage\":{"
                       "\"prompt_tokens\":3,\"completion_tokens\":2,"
                       "\"total_tokens\":5}}",
                       "", 0, LLMCB_REPLAY_CLOSE);
            scene_tape(&st.s,
                       JSON_HEAD "{\"choices\":[{\"index\":0,\"message\":{"
                       "\"role\":\"assistant\",\"content\":\"It is 42\"},"
                       "\"finish_reason\":\"stop\"}],\"usage\":{"
                       "\"prompt_tokens\":7,\"completion_tokens\":4,"
                       "\"total_tokens\":11}}",
                       "", 0, LLMCB_REPLAY_CLOSE);
        }
        CHECK(stage_open(&st));
        st.config.run_name = "my agent";
        st.config.run_id = "12345678-1234-4123-8123-123456789abc";
        st.op = ask(&st);
        CHECK(llmcb_agent_messages(st.op, &n) == NULL);
        CHECK_INT(n, 0);
        CHECK_STR(llmcb_op_output(st.op)->text.ptr, "");
        CHECK_INT(llmcb_op_result(st.op)->n_generations, 0);
        CHECK_STR(llmcb_op_run(st.op)->id, st.config.run_id);
        CHECK_INT(llmcb_op_wait(st.op), LLMCB_OK);
        CHECK_STR(llmcb_op_run(st.op)->name, "my agent");
        CHECK_STR(llmcb_op_output(st.op)->text.ptr, "It is 42");
        CHECK_STR(llmcb_op_result(st.op)->generations[0].text.ptr,
                  "It is 42");
        u = llmcb_op_usage(st.op);
        CHECK(u.known);
        CHECK_INT(u.input_tokens, 10);
        CHECK_INT(u.output_tokens, 6);
        CHECK_INT(u.total_tokens, 16);
        m = llmcb_agent_messages(st.op, &n);
        CHECK_INT(n, 3);
        if (n == 3) {
            CHECK_STR(m[0].content, "hi");
            CHECK_INT(m[1].role, LLMCB_ASSISTANT);
            CHECK_STR(m[1].content, "Let me see");
            CHECK_INT(m[1].n_tool_calls, 1);
            CHECK_STR(m[1].tool_calls[0].id.ptr, "c1");
            CHECK_STR(m[1].tool_calls[0].name.ptr, "add");
            CHECK_STR(m[1].tool_calls[0].arguments.ptr,
                      "{\"a\":40,\"b\":2}");
            CHECK(m[1].tool_calls[0].valid);
            CHECK_INT(m[2].role, LLMCB_TOOL);
            CHECK_STR(m[2].content, "42");
            CHECK_STR(m[2].tool_call_id, "c1");
        }
        CHECK(strstr(body(&st, 1),
                     "{\"role\":\"assistant\",\"content\":\"Let me see\","
                     "\"tool_calls\":[{\"type\":\"function\",\"id\":\"c1\","
                     "\"function\":{\"name\":\"add\",\"arguments\":"
                     "\"{\\\"a\\\":40,\\\"b\\\":2}\"}}]}") != NULL);
        read_op(st.op);
        finish(&st);
    }
}

/* An op of an agent, a run or a tool has the one run that is its own, however
 * many it has within it; at any time. */
static unsigned own_asked;

static void own_run(llmcb_op *op)
{
    own_asked++;
    CHECK(llmcb_op_run(op) != NULL);
    CHECK(llmcb_op_run_at(op, 0) == llmcb_op_run(op));
    CHECK(llmcb_op_run_at(op, 1) == NULL);
    CHECK(llmcb_op_run_at(op, SIZE_MAX) == NULL);
    CHECK(llmcb_op_error_at(op, 0) == llmcb_op_error(op));
}

static int own_act(wit *w, const llmcb_event *ev)
{
    (void)ev;
    if (*w->op) own_run(*w->op);
    return 0;
}

TEST(run_at_of_an_agent_is_its_own)
{
    static const llmcb_code codes[] = { LLMCB_OK, LLMCB_ETOOL, LLMCB_EHTTP,
                                        LLMCB_ECANCELLED };
    static const mode modes[] = { INLINE, ASYNC };
    size_t i;
    int k;

    for (i = 0; i < sizeof codes / sizeof *codes; i++)
        for (k = 0; k < 2; k++) {
            seen_run *root;
            stage st;

            stage_init(&st, modes[k]);
            st.w->act = own_act;
            own_asked = 0;
            st.s.cd.max_retries = -1;
            if (codes[i] == LLMCB_ETOOL)
                says(&st, TC("0", "c1", "add", "{\\\"a\\\":1}") TCEND);
            else
                says(&st, TWO_TOOLS);
            if (codes[i] == LLMCB_EHTTP)
                scene_tape(&st.s, "HTTP/1.1 400 Bad Request\r\n\r\n", "", 0,
                           LLMCB_REPLAY_CLOSE);
            else
                says(&st, SAYS("do|ne"));
            CHECK(stage_open(&st));
            st.op = ask(&st);
            own_run(st.op);
            if (codes[i] == LLMCB_ECANCELLED) {
                while (!st.w->count[LLMCB_TOOL_START])
                    llmcb_loop_run_once(st.s.loop, LLMCB_FOREVER);
                llmcb_op_cancel(st.op);
            }
            CHECK_INT(llmcb_op_wait(st.op), codes[i]);
            own_run(st.op);
            root = run_named(st.w, "AgentExecutor", 0);
            CHECK_STR(llmcb_op_run_at(st.op, 0) ? llmcb_op_run_at(st.op, 0)->id
                                                : NULL,
                      root->id);
            CHECK_INT(llmcb_op_error_at(st.op, 0)->code, codes[i]);
            CHECK(own_asked > 8);
            finish(&st);
        }
    CHECK(llmcb_op_run_at(NULL, 0) == NULL);
}

static llmcb_step own_step(llmcb_task *t)
{
    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_sleep(t, 5));
    LLMCB_END(t);
}

TEST(run_at_of_a_run_or_a_tool_is_its_own)
{
    int what;

    for (what = 0; what < 4; what++) {
        llmcb_tool_call call;
        llmcb_run_desc d;
        stage st;

        stage_init(&st, INLINE);
        st.w->act = own_act;
        own_asked = 0;
        says(&st, "x" DONE);
        CHECK(stage_open(&st));
        memset(&d, 0, sizeof d);
        memset(&call, 0, sizeof call);
        call.arguments = llmcb_text(what == 2 ? "{\"ms\":5}" : "[]");
        if (what == 0) d.body = own_step;
        if (what < 2)
            st.op = llmcb_run_start(st.s.loop, &d, &st.config);
        else /* one that is called, and one that is refused */
            st.op = llmcb_tool_start(st.s.loop, &st.tools[1], &call,
                                     &st.config);
        own_run(st.op);
        llmcb_loop_run_once(st.s.loop, 0);
        own_run(st.op);
        if (what == 1) llmcb_run_end(llmcb_op_run(st.op), llmcb_text("end"));
        CHECK_INT(llmcb_op_wait(st.op), what == 3 ? LLMCB_ETOOL : LLMCB_OK);
        own_run(st.op);
        CHECK_STR(st.w->runs[0].id, llmcb_op_run(st.op)->id);
        CHECK_INT(st.w->n, 1);
        CHECK_INT(own_asked, 5); /* two events, three times */
        finish(&st);
    }
}

/* Only what all turns said is known. */
TEST(usage_is_known_if_all_turns_told)
{
    stage st;

    stage_init(&st, INLINE);
    says(&st, TC("0", "c", "add", "{\\\"a\\\":1,\\\"b\\\":2}") DONE);
    says(&st, SAYS("3"));
    CHECK_INT(perform(&st), LLMCB_OK);
    CHECK(!llmcb_op_usage(st.op).known);
    CHECK_INT(llmcb_op_usage(st.op).total_tokens, 11);
    finish(&st);
    /* a call that failed told nothing */
    stage_init(&st, INLINE);
    says(&st, ONE_TOOL);
    scene_tape(&st.s, "HTTP/1.1 400 X\r\nContent-Length: 0\r\n\r\n", "", 0,
               LLMCB_REPLAY_KEEP);
    CHECK_INT(perform(&st), LLMCB_EHTTP);
    CHECK(!llmcb_op_usage(st.op).known);
    finish(&st);
}

/* ---- what goes out ------------------------------------------------------- */

TEST(tools_and_extra_in_the_requests)
{
    stage st;
    int k;

    for (k = 0; k < 3; k++) {
        stage_init(&st, INLINE);
        st.ad.n_tools = 1;
        st.s.cd.tools = "[{\"type\":\"of the chat\"}]";
        if (k == 1) st.config.extra = "{\"seed\":7,\"temperature\":0}";
        if (k == 2) st.config.extra = "{\"tools\":[{\"type\":\"mine\"}]}";
        says(&st, ONE_TOOL);
        says(&st, SAYS("3"));
        CHECK_INT(perform(&st), LLMCB_OK);
        CHECK_INT(st.n_bodies, 2);
        for (unsigned i = 0; i < 2; i++) {
            CHECK_INT(count_of(body(&st, i), "\"tools\":"), 1);
            CHECK(!strstr(body(&st, i), "of the chat"));
            CHECK_INT(count_of(body(&st, i), "\"seed\":7"), k == 1);
            CHECK_INT(count_of(body(&st, i), "\"mine\""), k == 2);
            CHECK_INT(count_of(body(&st, i),
                               "\"tools\":[{\"type\":\"function\","
                               "\"function\":{\"name\":\"add\","
                               "\"description\":\"a + b\",\"parameters\":{"
                               "\"type\":\"object\",\"required\":[\"a\"") !=
                          0,
                      k != 2);
        }
        finish(&st);
    }
    /* none of its own: those of the chat, whose calls it does not know */
    stage_init(&st, INLINE);
    st.ad.n_tools = 0;
    st.ad.tools = NULL;
    st.s.cd.tools = "[{\"type\":\"of the chat\"}]";
    says(&st, ONE_TOOL);
    says(&st, SAYS("3"));
    CHECK_INT(perform(&st), LLMCB_OK);
    CHECK(strstr(body(&st, 0), "of the chat") != NULL);
    CHECK(strstr(body(&st, 1), "add is not a valid tool, try one of [].") !=
          NULL);
    finish(&st);
    /* a tool without parameters or description */
    stage_init(&st, INLINE);
    st.tools[0] = echo_tool;
    st.ad.n_tools = 1;
    says(&st, SAYS("3"));
    CHECK_INT(perform(&st), LLMCB_OK);
    CHECK(strstr(body(&st, 0), "{\"name\":\"echo\",\"parameters\":{\"type\":"
                               "\"object\",\"properties\":{}}}") != NULL);
    finish(&st);
}

/* ---- shapes of tool calls that servers send (wire.md 1 and 7) ------------ */

#define DELTA(calls)                                                    \
    "{\"choices\":[{\"index\":0,\"delta\":{\"tool_calls\":[" calls "]}}]}"
#define FN(name, args) \
    "\"function\":{\"name\":\"" name "\",\"arguments\":\"" args "\"}"
#define ARGS(args) "\"function\":{\"arguments\":\"" args "\"}"
#define FIN(reason)                                                   \
    "|{\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"" reason \
    "\"}]}|[DONE]"
#define A12 "{\\\"a\\\":1,\\\"b\\\":2}"
#define A34 "{\\\"a\\\":3,\\\"b\\\":4}"
#define ADD12 "add({\"a\":1,\"b\":2}) "
#define ADD34 "add({\"a\":3,\"b\":4}) "

static const struct shape {
    const char *name, *pieces, *calls;
} shapes[] = {
    { "in pieces",
      DELTA("{\"index\":0,\"id\":\"x\"," FN("add", "") "}") "|"
      DELTA("{\"index\":0," ARGS("{\\\"a\\\":1,") "}") "|"
      DELTA("{\"index\":0," ARGS("\\\"b\\\":2}") "}") FIN("tool_calls"),
      ADD12 },
    { "no index, in pieces",
      DELTA("{\"id\":\"x\"," FN("add", "") "}") "|"
      DELTA("{" ARGS("{\\\"a\\\":1,") "}") "|"
      DELTA("{" ARGS("\\\"b\\\":2}") "}") FIN("tool_calls"),
      ADD12 },
    { "null index, whole calls",
      DELTA("{\"index\":null,\"id\":\"x\"," FN("add", A12) "}") "|"
      DELTA("{\"index\":null,\"id\":\"y\"," FN("add", A34) "}")
      FIN("tool_calls"),
      ADD12 ADD34 },
    { "two whole calls without index in one delta",
      DELTA("{\"id\":\"x\"," FN("add", A12) "},{\"id\":\"y\"," FN("add", A34)
            "}") FIN("tool_calls"),
      ADD12 ADD34 },
    { "no index, no id",
      DELTA("{" FN("add", A12) "}") "|" DELTA("{" FN("add", A34) "}")
      FIN("tool_calls"),
      ADD12 ADD34 },
    { "constant index, whole calls",
      DELTA("{\"index\":0,\"id\":\"x\"," FN("add", A12) "}") "|"
      DELTA("{\"index\":0,\"id\":\"y\"," FN("add", A34) "}")
      FIN("tool_calls"),
      ADD12 ADD34 },
    { "constant index, in pieces",
      DELTA("{\"index\":0,\"id\":\"x\"," FN("add", "{\\\"a\\\":1,") "}") "|"
      DELTA("{\"index\":0," ARGS("\\\"b\\\":2}") "}") "|"
      DELTA("{\"index\":0,\"id\":\"y\"," FN("add", "{\\\"a\\\":3,") "}") "|"
      DELTA("{\"index\":0," ARGS("\\\"b\\\":4}") "}") FIN("tool_calls"),
      ADD12 ADD34 },
    { "a new id with each piece",
      DELTA("{\"index\":0,\"id\":\"x1\"," FN("add", "") "}") "|"
      DELTA("{\"index\":0,\"id\":\"x2\"," ARGS("{\\\"a\\\":1,") "}") "|"
      DELTA("{\"index\":0,\"id\":\"x3\"," ARGS("\\\"b\\\":2}") "}")
      FIN("tool_calls"),
      ADD12 },
    { "the name with each piece",
      DELTA("{\"index\":0,\"id\":\"x\"," FN("add", "") "}") "|"
      DELTA("{\"index\":0,\"id\":\"x\"," FN("add", "{\\\"a\\\":1,") "}") "|"
      DELTA("{\"index\":0,\"id\":\"x\"," FN("add", "\\\"b\\\":2}") "}")
      FIN("tool_calls"),
      ADD12 },
    { "id and name null later",
      DELTA("{\"index\":0,\"id\":\"x\"," FN("add", "") "}") "|"
      DELTA("{\"index\":0,\"id\":null,\"function\":{\"name\":null,"
            "\"arguments\":\"{\\\"a\\\":1,\"}}") "|"
      DELTA("{\"index\":0,\"id\":\"\"," FN("", "\\\"b\\\":2}") "}")
      FIN("tool_calls"),
      ADD12 },
    { "interleaved (row 77)",
      DELTA("{\"index\":0,\"id\":\"x\"," FN("add", "") "}") "|"
      DELTA("{\"index\":1,\"id\":\"y\"," FN("add", "") "}") "|"
      DELTA("{\"index\":0," ARGS("{\\\"a\\\":1,") "}") "|"
      DELTA("{\"index\":1," ARGS("{\\\"a\\\":3,") "}") "|"
      DELTA("{\"index\":0," ARGS("\\\"b\\\":2}") "}") "|"
      DELTA("{\"index\":1," ARGS("\\\"b\\\":4}") "}") FIN("tool_calls"),
      ADD12 ADD34 },
    { "arguments as an object",
      DELTA("{\"index\":0,\"id\":\"x\",\"function\":{\"name\":\"add\","
            "\"arguments\":{\"a\":1,\"b\":2}}}") FIN("tool_calls"),
      ADD12 },
    { "finish_reason stop",
      DELTA("{\"index\":0,\"id\":\"x\"," FN("add", A12) "}") FIN("stop"),
      ADD12 },
    { "no finish_reason",
      DELTA("{\"index\":0,\"id\":\"x\"," FN("add", A12) "}") "|[DONE]",
      ADD12 },
    { "text between the calls, tool_calls null, content null",
      "{\"choices\":[{\"index\":0,\"delta\":{\"content\":null,"
      "\"tool_calls\":null}}]}|Well|"
      DELTA("{\"index\":0,\"id\":\"x\"," FN("add", A12) "}") "|and|"
      DELTA("{\"index\":1,\"id\":\"y\"," FN("add", A34) "}") "|so"
      FIN("tool_calls"),
      ADD12 ADD34 },
    { "indexes from 1",
      DELTA("{\"index\":1,\"id\":\"x\"," FN("add", A12) "}") "|"
      DELTA("{\"index\":2,\"id\":\"y\"," FN("add", A34) "}")
      FIN("tool_calls"),
      ADD12 ADD34 },
    { "no arguments at all",
      DELTA("{\"index\":0,\"id\":\"x\",\"function\":{\"name\":\"echo\"}}")
      FIN("tool_calls"),
      "echo({}) " },
    { "empty arguments",
      DELTA("{\"index\":0,\"id\":\"x\"," FN("echo", "") "}")
      FIN("tool_calls"),
      "echo({}) " },
};

TEST(case_077_078_every_shape_calls_the_tool)
{
    size_t i;

    for (i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        stage st;

        stage_init(&st, INLINE);
        says(&st, shapes[i].pieces);
        says(&st, SAYS("ok"));
        if (perform(&st) != LLMCB_OK)
            TEST_FAIL("%s: %s: %s", shapes[i].name,
                      llmcb_op_error(st.op)->message, st.w->log);
        if (strcmp(st.done, shapes[i].calls))
            TEST_FAIL("%s: %s, not %s", shapes[i].name, st.done,
                      shapes[i].calls);
        CHECK_INT(count_of(body(&st, 1), "\"role\":\"tool\""),
                  count_of(shapes[i].calls, "("));
        CHECK_INT(st.w->count[LLMCB_AGENT_ACTION],
                  count_of(shapes[i].calls, "("));
        finish(&st);
    }
}

/* What the model said is what it is shown again; ids are made if there are
 * none, and each answer names that of its call. */
TEST(calls_without_id_get_one)
{
    stage st;
    const llmcb_message *m;
    size_t n;

    stage_init(&st, INLINE);
    says(&st, DELTA("{\"index\":0," FN("add", A12) "},{\"index\":1,"
                    FN("add", A34) "}") FIN("tool_calls"));
    says(&st, DELTA("{\"index\":0," FN("add", A12) "}") FIN("tool_calls"));
    says(&st, SAYS("ok"));
    CHECK_INT(perform(&st), LLMCB_OK);
    m = llmcb_agent_messages(st.op, &n);
    CHECK_INT(n, 6);
    if (n == 6) {
        CHECK(m[1].tool_calls[0].id.len > 0);
        CHECK_STR(m[2].tool_call_id, m[1].tool_calls[0].id.ptr);
        CHECK_STR(m[3].tool_call_id, m[1].tool_calls[1].id.ptr);
        CHECK(strcmp(m[2].tool_call_id, m[3].tool_call_id) != 0);
        CHECK(strcmp(m[5].tool_call_id, m[3].tool_call_id) != 0);
        CHECK(strcmp(m[5].tool_call_id, m[2].tool_call_id) != 0);
    }
    finish(&st);
}

/* Text beside calls is the log of the actions, and goes back. */
static int log_is_text(wit *w, const llmcb_event *ev)
{
    if (ev->kind == LLMCB_AGENT_ACTION &&
        (strcmp(ev->action->log.ptr, "Hmm") ||
         strcmp(ev->action->tool_call_id.ptr, "x")))
        w->wrong = "the action's log or id";
    if (ev->kind == LLMCB_TOOL_START &&
        (strcmp(ev->start->tool_call_id.ptr, "x") ||
         strcmp(ev->start->description, "a + b")))
        w->wrong = "the start of the tool";
    if (ev->kind == LLMCB_AGENT_FINISH &&
        (strcmp(ev->output->text.ptr, "ok") ||
         strcmp(ev->output->log.ptr, "ok")))
        w->wrong = "the finish";
    if (ev->kind == LLMCB_CHAIN_START && !*ev->run->parent_id &&
        strcmp(ev->start->input.ptr, "hi"))
        w->wrong = "the input";
    if (ev->kind == LLMCB_CHAIN_END && !*ev->run->parent_id &&
        strcmp(ev->output->text.ptr, "ok"))
        w->wrong = "the output";
    return 0;
}

TEST(payloads_of_an_agent)
{
    stage st;

    stage_init(&st, INLINE);
    st.w->act = log_is_text;
    says(&st, "Hmm|" DELTA("{\"index\":0,\"id\":\"x\"," FN("add", A12) "}")
              FIN("tool_calls"));
    says(&st, SAYS("ok"));
    CHECK_INT(perform(&st), LLMCB_OK);
    CHECK(strstr(st.w->log, "tool_end:add=3 ") != NULL);
    finish(&st);
}

TEST(case_079_cut_off_arguments)
{
    stage st;
    size_t n;
    const llmcb_message *m;
    int handled;

    for (handled = 0; handled < 2; handled++) {
        stage_init(&st, INLINE);
        st.tools[0].handle_errors = handled;
        says(&st, TC("0", "x", "add", "{\\\"a\\\":1,\\\"b") FIN("length"));
        says(&st, SAYS("sorry"));
        CHECK_INT(perform(&st), handled ? LLMCB_OK : LLMCB_ETOOL);
        CHECK_STR(st.done, "");
        CHECK(strstr(st.w->log, "agent_action:add({\"a\":1,\"b) ") != NULL);
        CHECK(strstr(st.w->log, "tool_start:add({\"a\":1,\"b) ") != NULL);
        CHECK(strstr(st.w->log,
                     handled ? "tool_end:add!the arguments are not one JSON "
                               "object "
                             : "tool_error:add=ETOOL ") != NULL);
        m = llmcb_agent_messages(st.op, &n);
        CHECK_INT(n, handled ? 3 : 1);
        if (handled && n == 3) {
            CHECK_STR(m[1].tool_calls[0].arguments.ptr, "{\"a\":1,\"b");
            CHECK(!m[1].tool_calls[0].valid);
            CHECK(strstr(body(&st, 1),
                         "\"arguments\":\"{\\\"a\\\":1,\\\"b\"") != NULL);
        }
        finish(&st);
    }
}

TEST(unknown_tool)
{
    stage st;

    stage_init(&st, INLINE);
    st.ad.n_tools = 2;
    says(&st, TC("0", "x", "sub\\u0022tle", "{\\\"a\\\":") "|"
              TC("1", "y", "add", A12) TCEND);
    says(&st, SAYS("ok"));
    CHECK_INT(perform(&st), LLMCB_OK);
    CHECK(strstr(st.w->log, "agent_action:sub\"tle({\"a\":) ") != NULL);
    CHECK(strstr(st.w->log,
                 "tool_start:invalid_tool({\"requested_tool_name\":"
                 "\"sub\\\"tle\",\"available_tool_names\":\"add, slow\"}) ") !=
          NULL);
    CHECK(strstr(st.w->log, "tool_end:invalid_tool=sub\"tle is not a valid "
                            "tool, try one of [add, slow]. ") != NULL);
    CHECK_STR(run_named(st.w, "invalid_tool", 0)->parent,
              run_named(st.w, "AgentExecutor", 0)->id);
    CHECK(strstr(body(&st, 1),
                 "\"content\":\"sub\\\"tle is not a valid tool, try one of "
                 "[add, slow].\",\"tool_call_id\":\"x\"") != NULL);
    CHECK_STR(st.done, ADD12);
    finish(&st);
    /* a call without a name */
    stage_init(&st, INLINE);
    says(&st, DELTA("{\"index\":0,\"id\":\"x\"," ARGS("{}") "}")
              FIN("tool_calls"));
    says(&st, SAYS("ok"));
    CHECK_INT(perform(&st), LLMCB_OK);
    CHECK(strstr(st.w->log, "=  is not a valid tool") ||
          strstr(st.w->log, "= is not a valid tool"));
    finish(&st);
}

/* ---- arguments: what the schema says ------------------------------------- */

/* One call of a tool outside an agent. */
static llmcb_op *use(stage *st, const llmcb_tool *tool, const char *arguments)
{
    llmcb_tool_call call;

    memset(&call, 0, sizeof call);
    call.id = llmcb_text("id");
    call.arguments = llmcb_text(arguments);
    return llmcb_tool_start(st->s.loop, tool, &call, &st->config);
}

#define ZEROS_10 "0000000000"
#define ZEROS_100 \
    ZEROS_10 ZEROS_10 ZEROS_10 ZEROS_10 ZEROS_10 ZEROS_10 ZEROS_10 ZEROS_10 \
        ZEROS_10 ZEROS_10

static const struct schema_case {
    const char *schema, *arguments, *error; /* NULL: they are right */
} schema_cases[] = {
#define P(type) "{\"properties\":{\"v\":{\"type\":" type "}}}"
    { NULL, "", NULL },
    { NULL, "{}", NULL },
    { NULL, " {\"any\":1} ", NULL },
    { NULL, "[]", "not one JSON object" },
    { NULL, "null", "not one JSON object" },
    { NULL, " ", "not one JSON object" },
    { NULL, "{} {}", "not one JSON object" },
    { NULL, "{", "not one JSON object" },
    { NULL, "{\"a\":1,}", "not one JSON object" },
    { NULL, "{'a':1}", "not one JSON object" },
    { P("\"string\""), "{\"v\":\"\"}", NULL },
    { P("\"string\""), "{\"v\":1}", "wrong type: v" },
    { P("\"string\""), "{\"v\":null}", "wrong type: v" },
    { P("\"number\""), "{\"v\":-1.5e3}", NULL },
    { P("\"number\""), "{\"v\":7}", NULL },
    { P("\"number\""), "{\"v\":\"7\"}", "wrong type: v" },
    { P("\"integer\""), "{\"v\":7}", NULL },
    { P("\"integer\""), "{\"v\":-7}", NULL },
    { P("\"integer\""), "{\"v\":7.5}", "wrong type: v" },
    { P("\"integer\""), "{\"v\":7.0}", NULL },
    { P("\"integer\""), "{\"v\":-7.000}", NULL },
    { P("\"integer\""), "{\"v\":7.001}", "wrong type: v" },
    { P("\"integer\""), "{\"v\":7.0e1}", "wrong type: v" },
    { P("\"integer\""), "{\"v\":true}", "wrong type: v" },
    { P("\"boolean\""), "{\"v\":true}", NULL },
    { P("\"boolean\""), "{\"v\":false}", NULL },
    { P("\"boolean\""), "{\"v\":0}", "wrong type: v" },
    { P("\"array\""), "{\"v\":[1,{}]}", NULL },
    { P("\"array\""), "{\"v\":{}}", "wrong type: v" },
    { P("\"object\""), "{\"v\":{\"v\":1}}", NULL },
    { P("\"object\""), "{\"v\":[]}", "wrong type: v" },
    { P("\"integer\""), "{\"v\":1E2}", "wrong type: v" },
    { P("\"integer\""), "{\"v\":1e2}", "wrong type: v" },
    { P("\"null\""), "{\"v\":null}", NULL },
    { P("\"null\""), "{\"v\":false}", "wrong type: v" },
    { P("\"unheard of\""), "{\"v\":1}", NULL },
    { P("[\"string\",\"null\"]"), "{\"v\":null}", NULL },
    { P("[\"string\",\"null\"]"), "{\"v\":\"\"}", NULL },
    { P("[\"string\",\"null\"]"), "{\"v\":2}", "wrong type: v" },
    { P("[]"), "{\"v\":2}", "wrong type: v" },
    { P("7"), "{\"v\":2}", NULL },
    { "{\"properties\":{\"v\":true}}", "{\"v\":2}", NULL },
    { "{\"properties\":{\"v\":{}}}", "{\"v\":2}", NULL },
    { "{\"properties\":7}", "{\"v\":2}", NULL },
    /* values that hold the same names one level down */
    { P("\"integer\""), "{\"w\":{\"v\":\"s\"},\"v\":1}", NULL },
    { P("\"integer\""), "{\"w\":[{\"v\":\"s\"}],\"v\":\"s\"}",
      "wrong type: v" },
    { "{\"x\":{\"required\":[\"a\"]}}", "{}", NULL },
    { "{\"required\":[\"a\",\"b\"]}", "{\"a\":1}", "missing argument: b" },
    { "{\"required\":[\"a\",\"b\"]}", "{\"b\":1,\"a\":null}", NULL },
    { "{\"required\":[\"a\"]}", "", "missing argument: a" },
    { "{\"required\":[]}", "{}", NULL },
    { "{\"required\":\"a\"}", "{}", NULL },
    { "{\"required\":[\"a\"]}", "{\"b\":{\"a\":1}}", "missing argument: a" },
    { "{\"additionalProperties\":false,\"properties\":{\"v\":{}}}",
      "{\"v\":1,\"w\":2}", "unknown argument: w" },
    { "{\"additionalProperties\":false,\"properties\":{\"v\":{}}}",
      "{\"v\":1}", NULL },
    { "{\"additionalProperties\":true,\"properties\":{\"v\":{}}}",
      "{\"w\":1}", NULL },
    { "{\"additionalProperties\":{\"type\":\"string\"},\"properties\":{}}",
      "{\"w\":1}", NULL },
    { "{\"additionalProperties\":false}", "{\"w\":1}",
      "unknown argument: w" },
    /* twice the same: both must be right */
    { P("\"integer\""), "{\"v\":1,\"v\":\"s\"}", "wrong type: v" },
    { P("\"integer\""), "{\"v\":\"s\",\"v\":1}", "wrong type: v" },
    /* names that are escaped, in the schema or in the arguments */
    { "{\"required\":[\"caf\\u00e9\"]}", "{\"caf\xC3\xA9\":1}", NULL },
    { "{\"required\":[\"caf\\u00e9\"]}", "{\"caf\\u00e9\":1}", NULL },
    { "{\"required\":[\"caf\xC3\xA9\"]}", "{\"caf\\u00e9\":1}", NULL },
    { "{\"required\":[\"a\\/b\"]}", "{\"a/b\":1}", NULL },
    { "{\"required\":[\"caf\\u00e9\"]}", "{\"cafe\":1}",
      "missing argument: caf\xC3\xA9" },
    { "{\"properties\":{\"caf\\u00e9\":{\"type\":\"string\"}}}",
      "{\"caf\xC3\xA9\":1}", "wrong type: caf\xC3\xA9" },
    { "{\"properties\":{\"caf\xC3\xA9\":{\"type\":\"string\"}}}",
      "{\"caf\\u00e9\":1}", "wrong type: caf\xC3\xA9" },
    { "{\"properties\":{\"caf\\u00e9\":{\"type\":\"string\"}}}",
      "{\"caf\\u00E9\":1}", "wrong type: caf\xC3\xA9" },
    { "{\"additionalProperties\":false,\"properties\":{\"a/b\":{}}}",
      "{\"a\\/b\":1}", NULL },
    /* what no double and no int64_t holds */
    { P("\"number\""), "{\"v\":1e308}", NULL },
    { P("\"number\""), "{\"v\":-1.7976931348623157e308}", NULL },
    { P("\"number\""), "{\"v\":1e-999}", NULL },
    { P("\"number\""), "{\"v\":0e999}", NULL },
    { P("\"number\""), "{\"v\":1e999}", "argument out of range: v" },
    { P("\"number\""), "{\"v\":-1E+309}", "argument out of range: v" },
    { P("\"number\""), "{\"v\":1e99999999999999999999}",
      "argument out of range: v" },
    { P("\"number\""),
      "{\"v\":1" ZEROS_100 ZEROS_100 ZEROS_100 ZEROS_100 ZEROS_100 "}",
      "argument out of range: v" },
    { P("\"number\""),
      "{\"v\":-1" ZEROS_100 ZEROS_100 ZEROS_100 ZEROS_100 ZEROS_100 ".5}",
      "argument out of range: v" },
    { P("\"integer\""), "{\"v\":9223372036854775807}", NULL },
    { P("\"integer\""), "{\"v\":-9223372036854775808}", NULL },
    { P("\"integer\""), "{\"v\":-9223372036854775808.0}", NULL },
    { P("\"integer\""), "{\"v\":9223372036854775808}",
      "argument out of range: v" },
    { P("\"integer\""), "{\"v\":9223372036854775808.00}",
      "argument out of range: v" },
    { P("\"integer\""), "{\"v\":-9223372036854775809}",
      "argument out of range: v" },
    { P("\"integer\""),
      "{\"v\":1" ZEROS_100 ZEROS_100 ZEROS_100 ZEROS_100 ZEROS_100 "}",
      "argument out of range: v" },
    { P("\"number\""), "{\"v\":1e999,\"v\":1}", "argument out of range: v" },
    { P("\"number\""), "{\"v\":1,\"v\":1e999}", "argument out of range: v" },
    { P("\"number\""), "{\"w\":1e999,\"v\":1}", NULL },
    { P("\"number\""), "{\"w\":{\"v\":1e999},\"v\":1}", NULL },
    { P("[\"null\",\"number\"]"), "{\"v\":1e999}", "argument out of range: v" },
    { P("[\"null\",\"integer\"]"), "{\"v\":9223372036854775808}",
      "argument out of range: v" },
    { P("\"string\""), "{\"v\":1e999}", "wrong type: v" },
    { P("\"array\""), "{\"v\":[1e999]}", NULL },
    { "{\"properties\":{\"v\":{}}}", "{\"v\":1e999}", NULL },
    { "{\"properties\":{\"caf\\u00e9\":{\"type\":\"number\"}}}",
      "{\"caf\xC3\xA9\":1e999}", "argument out of range: caf\xC3\xA9" },
    { "{\"required\":[\"v\"],\"properties\":{\"v\":{\"type\":\"integer\"}}}",
      "{\"v\":9223372036854775808}", "argument out of range: v" },
    /* escapes longer than a short name's */
    { "{\"required\":[\"\xE3\x81\x82\xE3\x81\x82\xE3\x81\x82\xE3\x81\x82"
      "\xE3\x81\x82\xE3\x81\x82\xE3\x81\x82\xE3\x81\x82\"]}",
      "{\"\\u3042\\u3042\\u3042\\u3042\\u3042\\u3042\\u3042\\u3042\":1}",
      NULL },
    { "{\"properties\":{\"\\u3042\\u3042\\u3042\\u3042\\u3042\\u3042\\u3042\":"
      "{\"type\":\"null\"}}}",
      "{\"\\u3042\\u3042\\u3042\\u3042\\u3042\\u3042\\u3042\":1}",
      "wrong type" },
};

TEST(arguments_are_checked)
{
    size_t i;
    int handled;

    for (i = 0; i < sizeof schema_cases / sizeof *schema_cases; i++)
        for (handled = 0; handled < 2; handled++) {
            const struct schema_case *c = &schema_cases[i];
            llmcb_tool tool = echo_tool;
            const char *got;
            stage st;

            stage_init(&st, INLINE);
            tool.parameters = c->schema;
            tool.handle_errors = handled;
            says(&st, "x" DONE);
            CHECK(stage_open(&st));
            st.op = use(&st, &tool, c->arguments);
            llmcb_op_wait(st.op);
            got = handled ? llmcb_op_output(st.op)->text.ptr
                          : llmcb_op_error(st.op)->message;
            if (!c->error != (*st.done != 0))
                TEST_FAIL("%s with %s: %s", c->schema ? c->schema : "(none)",
                          c->arguments, got);
            CHECK_INT(llmcb_op_code(st.op),
                      c->error && !handled ? LLMCB_ETOOL : LLMCB_OK);
            CHECK_INT(llmcb_op_output(st.op)->failed, c->error && handled);
            if (c->error && !strstr(got, c->error))
                TEST_FAIL("%s with %s: %s", c->schema, c->arguments, got);
            /* a failure stands behind the start (row 99) */
            CHECK_INT(st.w->count[LLMCB_TOOL_START], 1);
            CHECK_INT(st.w->count[LLMCB_TOOL_ERROR], c->error && !handled);
            CHECK_INT(st.w->count[LLMCB_TOOL_END], !c->error || handled);
            finish(&st);
        }
}

/* A name of any length in a message is cut to valid UTF-8. */
TEST(long_names_in_messages)
{
    char arguments[2000] = "{\"";
    llmcb_tool tool = echo_tool;
    stage st;
    int i, k;

    for (k = 0; k < 3; k++) {
        arguments[2] = '\0';
        for (i = 0; i < 400; i++)
            strcat(arguments, k == 0 ? "\xC3\xA9" : k == 1 ? "\\n" : "x");
        strcat(arguments, "\":1}");
        stage_init(&st, INLINE);
        tool.parameters = "{\"additionalProperties\":false,"
                          "\"properties\":{}}";
        tool.handle_errors = true;
        says(&st, "x" DONE);
        CHECK(stage_open(&st));
        st.op = use(&st, &tool, arguments);
        CHECK_INT(llmcb_op_wait(st.op), LLMCB_OK);
        CHECK(llmcb_op_output(st.op)->text.len > 60 &&
              llmcb_op_output(st.op)->text.len < 256);
        CHECK(llmcbi_utf8_valid(llmcb_op_output(st.op)->text.ptr,
                                llmcb_op_output(st.op)->text.len));
        finish(&st);
    }
}

/* ---- arguments: the getters ---------------------------------------------- */

static const char *const getter_arguments =
    "{\"t\":\"a\\u00e9\\ud83d\\ude00\\n\\/\",\"half\":\"x\\ud83dy\","
    "\"low\":\"\\ude00\",\"end\":\"z\\ud83d\",\"nul\":\"a\\u0000b\","
    "\"empty\":\"\",\"int\":-42,\"big\":9223372036854775808,"
    "\"small\":-9223372036854775809,\"max\":9007199254740993,"
    "\"frac\":1.5,\"exp\":1e3,\"neg\":-0.25e-2,\"huge\":1e999,"
    "\"tiny\":1e-999,\"yes\":true,\"no\":false,\"null\":null,"
    "\"obj\":{\"t\":\"inner\",\"a\":[1, 2]},\"arr\": [ 1 , \"]\" ] ,"
    "\"esc\\u0061ped\":1,\"t\":\"second\",\"cap\":2.5E2,\"plus\":1e+5,"
    "\"vast\":1e9999999999999999999999,\"faint\":-1E-9999999999999999999999,"
    "\"long\":1" ZEROS_100 ZEROS_100 ZEROS_100 ZEROS_100 "e-400,"
    "\"longest\":1" ZEROS_100 ZEROS_100 ZEROS_100 "}";

static int getters_call(llmcb_tool_use *u)
{
    llmcb_str s = { NULL, 0 }, again;
    int64_t i = 0;
    double d = 0;
    bool b = false;
    const char *wrong = NULL;

#define WANT(cond) \
    if (!wrong && !(cond)) wrong = #cond
    WANT(llmcb_tool_text(u, "t", &s) && s.len == 9 &&
         !strcmp(s.ptr, "a\xC3\xA9\xF0\x9F\x98\x80\n/"));
    again = s;
    WANT(llmcb_tool_text(u, "half", &s) &&
         !strcmp(s.ptr, "x\xEF\xBF\xBDy"));
    WANT(llmcb_tool_text(u, "low", &s) && !strcmp(s.ptr, "\xEF\xBF\xBD"));
    WANT(llmcb_tool_text(u, "end", &s) && !strcmp(s.ptr, "z\xEF\xBF\xBD"));
    WANT(llmcb_tool_text(u, "nul", &s) && s.len == 3 &&
         !memcmp(s.ptr, "a\0b", 4));
    WANT(llmcb_tool_text(u, "empty", &s) && s.len == 0 && !*s.ptr);
    WANT(!strcmp(again.ptr, "a\xC3\xA9\xF0\x9F\x98\x80\n/"));
    WANT(!llmcb_tool_text(u, "int", &s));
    WANT(!llmcb_tool_text(u, "null", &s));
    WANT(!llmcb_tool_text(u, "none", &s));
    WANT(!llmcb_tool_text(u, "inner", &s));
    WANT(!llmcb_tool_text(u, "", &s));
    WANT(llmcb_tool_int(u, "int", &i) && i == -42);
    WANT(llmcb_tool_int(u, "max", &i) && i == 9007199254740993);
    WANT(!llmcb_tool_int(u, "big", &i));
    WANT(!llmcb_tool_int(u, "small", &i));
    WANT(!llmcb_tool_int(u, "frac", &i));
    WANT(!llmcb_tool_int(u, "exp", &i));
    WANT(!llmcb_tool_int(u, "t", &i));
    WANT(!llmcb_tool_int(u, "yes", &i));
    WANT(llmcb_tool_int(u, "escaped", &i) && i == 1);
    WANT(llmcb_tool_number(u, "frac", &d) && d == 1.5);
    WANT(llmcb_tool_number(u, "exp", &d) && d == 1000);
    WANT(llmcb_tool_number(u, "neg", &d) && d == -0.0025);
    WANT(llmcb_tool_number(u, "int", &d) && d == -42);
    WANT(llmcb_tool_number(u, "big", &d) && d == 9223372036854775808.0);
    WANT(llmcb_tool_number(u, "tiny", &d) && d == 0);
    WANT(!llmcb_tool_number(u, "huge", &d));
    WANT(llmcb_tool_number(u, "cap", &d) && d == 250);
    WANT(llmcb_tool_number(u, "plus", &d) && d == 100000);
    WANT(!llmcb_tool_number(u, "vast", &d));
    WANT(llmcb_tool_number(u, "faint", &d) && d == 0);
    WANT(!llmcb_tool_number(u, "long", &d)); /* of more than 400 bytes */
    WANT(llmcb_tool_number(u, "longest", &d) && d == 1e300);
    WANT(!llmcb_tool_number(u, "t", &d));
    WANT(!llmcb_tool_number(u, "null", &d));
    WANT(llmcb_tool_bool(u, "yes", &b) && b);
    WANT(llmcb_tool_bool(u, "no", &b) && !b);
    WANT(!llmcb_tool_bool(u, "null", &b));
    WANT(!llmcb_tool_bool(u, "int", &b));
    WANT(!llmcb_tool_bool(u, "gone", &b));
    WANT(llmcb_tool_json(u, "obj", &s) &&
         llmcbi_str_is(s, "{\"t\":\"inner\",\"a\":[1, 2]}"));
    WANT(llmcb_tool_json(u, "arr", &s) && llmcbi_str_is(s, "[ 1 , \"]\" ]"));
    WANT(llmcb_tool_json(u, "half", &s) &&
         llmcbi_str_is(s, "\"x\\ud83dy\""));
    WANT(llmcb_tool_json(u, "null", &s) && llmcbi_str_is(s, "null"));
    WANT(llmcb_tool_json(u, "exp", &s) && llmcbi_str_is(s, "1e3"));
    WANT(!llmcb_tool_json(u, "none", &s));
    WANT(!llmcb_tool_text(NULL, "t", &s) && !llmcb_tool_int(NULL, "t", &i) &&
         !llmcb_tool_number(NULL, "t", &d) &&
         !llmcb_tool_bool(NULL, "t", &b) && !llmcb_tool_json(NULL, "t", &s));
    if (wrong) return llmcb_tool_fail(u, wrong);
    return llmcb_tool_answer(u, llmcb_text("all right"));
#undef WANT
}

/* In locales with a comma, and with a point that is no ASCII. */
TEST(arguments_by_name)
{
    static const char *const points[] = { ".", ",", "\xD9\xAB" };
    llmcb_tool tool = echo_tool;
    stage st;
    size_t i;

    tool.step = NULL;
    tool.call = getters_call;
    for (i = 0; i < 3; i++) {
        locale_point = points[i];
        stage_init(&st, INLINE);
        says(&st, "x" DONE);
        CHECK(stage_open(&st));
        st.op = use(&st, &tool, getter_arguments);
        llmcb_op_wait(st.op);
        if (llmcb_op_code(st.op) != LLMCB_OK)
            TEST_FAIL("point %s: %s", points[i],
                      llmcb_op_error(st.op)->message);
        CHECK_STR(llmcb_op_output(st.op)->text.ptr, "all right");
        finish(&st);
    }
    locale_point = ".";
    CHECK_INT(llmcb_tool_answer(NULL, llmcb_text("x")), LLMCB_ENOMEM);
    CHECK_INT(llmcb_tool_fail(NULL, "x"), LLMCB_ETOOL);
    CHECK_INT(llmcb_tool_fail(NULL, NULL), LLMCB_ETOOL);
}

/* What is no boolean leaves the caller's default as it was. */
static int default_call(llmcb_tool_use *u)
{
    static const char *const names[] = { "null", "int", "t",  "obj",
                                         "arr",  "gone", "", "frac" };
    size_t i;
    int k;

    for (i = 0; i < sizeof names / sizeof *names; i++)
        for (k = 0; k < 2; k++) {
            bool b = k;
            if (llmcb_tool_bool(u, names[i], &b) || b != (bool)k)
                return llmcb_tool_fail(u, names[i]);
            if (llmcb_tool_bool(NULL, "yes", &b) || b != (bool)k)
                return llmcb_tool_fail(u, "NULL");
            b = k;
            if (!llmcb_tool_bool(u, "yes", &b) || !b)
                return llmcb_tool_fail(u, "yes");
            b = k;
            if (!llmcb_tool_bool(u, "no", &b) || b)
                return llmcb_tool_fail(u, "no");
        }
    return llmcb_tool_answer(u, llmcb_text("all right"));
}

TEST(a_boolean_that_is_not_there_leaves_the_default)
{
    llmcb_tool tool = echo_tool;
    stage st;

    tool.step = NULL;
    tool.call = default_call;
    stage_init(&st, INLINE);
    says(&st, "x" DONE);
    CHECK(stage_open(&st));
    st.op = use(&st, &tool, getter_arguments);
    llmcb_op_wait(st.op);
    CHECK_STR(llmcb_op_error(st.op)->message, "no error");
    CHECK_STR(llmcb_op_output(st.op)->text.ptr, "all right");
    finish(&st);
}

/* The values of members as JSON, all of one call at once. */
static const char *const json_names[] = { "obj", "arr", "exp", "null", "half",
                                          "yes", "longest", "plus", "empty",
                                          "int", "esc" };
static const char *const json_values[] = {
    "{\"t\":\"inner\",\"a\":[1, 2]}", "[ 1 , \"]\" ]", "1e3", "null",
    "\"x\\ud83dy\"", "true", "1" ZEROS_100 ZEROS_100 ZEROS_100, "1e+5",
    "\"\"", "-42", NULL
};
#define N_JSON (sizeof json_names / sizeof *json_names)

typedef struct json_frame {
    llmcb_str got[N_JSON];
} json_frame;

static const char *json_get(llmcb_tool_use *u, llmcb_str *got)
{
    size_t i;

    for (i = 0; i < N_JSON; i++) {
        got[i] = llmcb_text("as it was");
        if (llmcb_tool_json(u, json_names[i], &got[i]) != !!json_values[i])
            return json_names[i];
    }
    return NULL;
}

static const char *json_look(const llmcb_str *got)
{
    size_t i;

    for (i = 0; i < N_JSON; i++) {
        const char *want = json_values[i] ? json_values[i] : "as it was";
        if (got[i].len != strlen(want) || got[i].ptr[got[i].len] ||
            strcmp(got[i].ptr, want) != 0)
            return json_names[i];
    }
    return NULL;
}

static llmcb_step json_step(llmcb_task *t, llmcb_tool_use *u)
{
    json_frame *f = (json_frame *)t->frame;
    const char *wrong;
    llmcb_str again;

    LLMCB_BEGIN(t);
    wrong = json_get(u, f->got);
    if (!wrong) wrong = json_look(f->got);
    if (wrong) return llmcb_tool_fail(u, wrong);
    LLMCB_AWAIT(t, llmcb_sleep(t, 5));
    if (!llmcb_tool_text(u, "t", &again) || !llmcb_tool_json(u, "t", &again))
        return llmcb_tool_fail(u, "again");
    wrong = json_look(f->got);
    if (wrong) return llmcb_tool_fail(u, wrong);
    LLMCB_AWAIT(t, llmcb_sleep(t, 5));
    wrong = json_look(f->got);
    if (wrong) return llmcb_tool_fail(u, wrong);
    return llmcb_tool_answer(u, f->got[0]);
    LLMCB_END(t);
}

static int json_call(llmcb_tool_use *u)
{
    llmcb_str got[N_JSON];
    const char *wrong = json_get(u, got);

    if (!wrong) wrong = json_look(got);
    if (wrong) return llmcb_tool_fail(u, wrong);
    return llmcb_tool_answer(u, got[0]);
}

/* So that it can be given to strtod, or to a parser of JSON. */
TEST(the_json_of_an_argument_ends_with_a_nul)
{
    int blocking;

    for (blocking = 0; blocking < 2; blocking++) {
        llmcb_tool tool = echo_tool;
        stage st;

        tool.step = blocking ? NULL : json_step;
        tool.call = blocking ? json_call : NULL;
        tool.frame_size = sizeof(json_frame);
        stage_init(&st, INLINE);
        says(&st, "x" DONE);
        CHECK(stage_open(&st));
        st.op = use(&st, &tool, getter_arguments);
        llmcb_op_wait(st.op);
        CHECK_STR(llmcb_op_error(st.op)->message, "no error");
        CHECK_STR(llmcb_op_output(st.op)->text.ptr, json_values[0]);
        finish(&st);
    }
}

/* No memory for it: it is not there, and the value stays as it was. */
static unsigned json_missing;

static llmcb_step poor_step(llmcb_task *t, llmcb_tool_use *u)
{
    heap *h = &on_stage->s.heap;
    llmcb_str value = llmcb_text("as it was");
    bool got;

    (void)t;
    h->fail_at = h->calls + 1;
    h->for_ever = true;
    got = llmcb_tool_json(u, "big", &value);
    h->fail_at = 0;
    h->for_ever = false;
    if (got) {
        if (value.len != 6000 || value.ptr[6000])
            return llmcb_tool_fail(u, "not the whole");
    } else {
        json_missing++;
        if (value.len != 9 || strcmp(value.ptr, "as it was") != 0)
            return llmcb_tool_fail(u, "not as it was");
    }
    return llmcb_tool_answer(u, llmcb_text("all right"));
}

TEST(no_memory_for_the_json_of_an_argument)
{
    static char arguments[7000];
    llmcb_tool tool = echo_tool;
    size_t n = (size_t)sprintf(arguments, "{\"big\":\"");
    stage st;

    memset(arguments + n, 'x', 5998);
    strcpy(arguments + n + 5998, "\",\"more\":1}");
    tool.step = poor_step;
    stage_init(&st, INLINE);
    says(&st, "x" DONE);
    CHECK(stage_open(&st));
    st.op = use(&st, &tool, arguments);
    json_missing = 0;
    llmcb_op_wait(st.op);
    if (llmcb_op_code(st.op) != LLMCB_ENOMEM) {
        CHECK_STR(llmcb_op_error(st.op)->message, "no error");
        CHECK_STR(llmcb_op_output(st.op)->text.ptr, "all right");
    }
    CHECK_INT(json_missing, 1);
    finish(&st);
}

/* Reads both, which its schema requires; it can rely on them. */
static unsigned sure_calls;
static double sure_number;
static int64_t sure_int;

static llmcb_step sure_step(llmcb_task *t, llmcb_tool_use *u)
{
    (void)t;
    sure_calls++;
    if (!llmcb_tool_number(u, "n", &sure_number))
        return llmcb_tool_fail(u, "no number");
    if (!llmcb_tool_int(u, "i", &sure_int))
        return llmcb_tool_fail(u, "no integer");
    return llmcb_tool_answer(u, llmcb_text("both"));
}

#define THREES_10 "3333333333"
#define THREES_100 \
    THREES_10 THREES_10 THREES_10 THREES_10 THREES_10 THREES_10 THREES_10 \
        THREES_10 THREES_10 THREES_10
TEST(required_numbers_can_be_read)
{
    enum { CALLED, REFUSED, EITHER };
    static const struct {
        const char *n, *i;
        int what;
        double number;
        int64_t integer;
    } rows[] = {
        { "1.5", "7", CALLED, 1.5, 7 },
        { "-7", "-7.00", CALLED, -7, -7 },
        { "1e308", "9223372036854775807", CALLED, 1e308, INT64_MAX },
        { "-1e308", "-9223372036854775808", CALLED, -1e308, INT64_MIN },
        { "1e-999", "9223372036854775807.0", CALLED, 0, INT64_MAX },
        { "0e999", "-0", CALLED, 0, 0 },
        { "0.0e-99999999999999999999", "0.000", CALLED, 0, 0 },
        { "0e99999999999999999999", "1", CALLED, 0, 1 },
        { "9223372036854775808", "1", CALLED, 9223372036854775808.0, 1 },
        { "1e999", "1", REFUSED, 0, 0 },
        { "-1e999", "1", REFUSED, 0, 0 },
        { "1e309", "1", REFUSED, 0, 0 },
        { "1", "9223372036854775808", REFUSED, 0, 0 },
        { "1", "-9223372036854775809.0", REFUSED, 0, 0 },
        { "1" ZEROS_100 ZEROS_100 ZEROS_100 ZEROS_100 ZEROS_100, "1", REFUSED,
          0, 0 },
        { "1", "1" ZEROS_100 ZEROS_100 ZEROS_100 ZEROS_100 ZEROS_100, REFUSED,
          0, 0 },
        /* long, but a double is near, and an integer */
        { "1" ZEROS_100 ZEROS_100 ZEROS_100 ZEROS_100 "e-400", "1", EITHER, 1,
          1 },
        { "0." THREES_100 THREES_100 THREES_100 THREES_100 THREES_100, "1",
          EITHER, 1.0 / 3, 1 },
        { "3." ZEROS_100 ZEROS_100 ZEROS_100 ZEROS_100 ZEROS_100, "1", EITHER,
          3, 1 },
        { "0." ZEROS_100 ZEROS_100 ZEROS_100 ZEROS_100 ZEROS_100 "1", "1",
          EITHER, 0, 1 },
        { "1", "7." ZEROS_100 ZEROS_100 ZEROS_100 ZEROS_100 ZEROS_100, EITHER,
          1, 7 },
    };
    llmcb_tool tool = echo_tool;
    char arguments[2000];
    size_t k;
    int handled;

    tool.step = sure_step;
    tool.parameters = "{\"type\":\"object\",\"required\":[\"n\",\"i\"],"
                      "\"properties\":{\"n\":{\"type\":\"number\"},"
                      "\"i\":{\"type\":\"integer\"}}}";
    for (k = 0; k < sizeof rows / sizeof *rows; k++)
        for (handled = 0; handled < 2; handled++) {
            const char *said;
            char want[40];
            stage st;

            sprintf(want, "argument out of range: %c",
                    strcmp(rows[k].n, "1") ? 'n' : 'i');
            snprintf(arguments, sizeof arguments, "{\"n\":%s,\"i\":%s}",
                     rows[k].n, rows[k].i);
            tool.handle_errors = handled;
            stage_init(&st, INLINE);
            says(&st, "x" DONE);
            CHECK(stage_open(&st));
            sure_calls = 0;
            st.op = use(&st, &tool, arguments);
            llmcb_op_wait(st.op);
            said = llmcb_op_code(st.op) == LLMCB_OK
                       ? llmcb_op_output(st.op)->text.ptr
                       : llmcb_op_error(st.op)->message;
            if (rows[k].what == CALLED) CHECK_INT(sure_calls, 1);
            if (rows[k].what == REFUSED) CHECK_INT(sure_calls, 0);
            if (strcmp(said, sure_calls ? "both" : want) != 0)
                TEST_FAIL("%.60s: %s", arguments, said);
            if (sure_calls && (sure_number != rows[k].number ||
                               sure_int != rows[k].integer))
                TEST_FAIL("%.60s: %g and %lld", arguments, sure_number,
                          (long long)sure_int);
            finish(&st);
        }
}

/* A tool that fails without a word has failed all the same. */
static int wordless_call(llmcb_tool_use *u)
{
    return llmcb_tool_fail(u, NULL);
}

TEST(a_failure_without_a_word)
{
    llmcb_tool tool = echo_tool;
    stage st;

    tool.step = NULL;
    tool.call = wordless_call;
    stage_init(&st, INLINE);
    says(&st, "x" DONE);
    CHECK(stage_open(&st));
    st.op = use(&st, &tool, "{}");
    CHECK_INT(llmcb_op_wait(st.op), LLMCB_ETOOL);
    CHECK(*llmcb_op_error(st.op)->message != '\0');
    finish(&st);
}

/* ---- approval ------------------------------------------------------------ */

typedef struct asking {
    int64_t ms;
    llmcb_step result;
    unsigned asked, refused_by_cancel;
    size_t frame; /* that many bytes of it are written */
    const char *wrong;
} asking;

static llmcb_step approve(llmcb_task *t, const llmcb_tool_use *use)
{
    asking *a = (asking *)t->self;
    size_t i;

    LLMCB_BEGIN(t);
    a->asked++;
    for (i = 0; i < a->frame; i++) {
        if (((char *)t->frame)[i]) a->wrong = "the frame is not zeroed";
        ((char *)t->frame)[i] = 1;
    }
    if (!use->tool || !use->run || !use->arguments.ptr || !use->id.ptr)
        a->wrong = "the use";
    if (a->ms) {
        LLMCB_AWAIT(t, llmcb_sleep(t, a->ms));
        a->refused_by_cancel += t->result == LLMCB_ECANCELLED;
    }
    return a->result;
    LLMCB_END(t);
}

static llmcb_step frame_step(llmcb_task *t, llmcb_tool_use *use)
{
    size_t i;

    LLMCB_BEGIN(t);
    did(use);
    for (i = 0; i < use->tool->frame_size; i++)
        if (((char *)t->frame)[i]) return llmcb_tool_fail(use, "dirty");
    if (t->self != use->tool->user) return llmcb_tool_fail(use, "user");
    memset(t->frame, 7, use->tool->frame_size);
    LLMCB_AWAIT(t, llmcb_sleep(t, 1));
    if (t->result != LLMCB_OK) return t->result;
    return llmcb_tool_answer(use, llmcb_text("clean"));
    LLMCB_END(t);
}

TEST(approval)
{
    static const struct {
        int64_t ms;
        llmcb_step result;
        bool may;
    } cases[] = {
        { 0, LLMCB_DONE, true },    { 10, LLMCB_DONE, true },
        { 0, LLMCB_ETOOL, false },  { 10, LLMCB_ETOOL, false },
        { 0, LLMCB_EINVAL, false }, { 0, 2, false },
        { 10, -77, false },         { 0, LLMCB_ECANCELLED, false },
        { 0, LLMCB_EHANDLER, false }
    };
    size_t i;
    int kind;

    for (i = 0; i < sizeof cases / sizeof *cases; i++)
        for (kind = 0; kind < 6; kind++) {
            asking a;
            stage st;

            memset(&a, 0, sizeof a);
            a.ms = cases[i].ms;
            a.result = cases[i].result;
            a.frame = (size_t)(kind % 3) * 100;
            stage_init(&st, kind % 2 ? SYNC : INLINE);
            st.ad.approve = approve;
            st.ad.approve_frame = a.frame;
            st.ad.user = &a;
            st.tools[3].step = kind < 3 ? frame_step : NULL;
            st.tools[3].call = kind < 3 ? NULL : echo_call;
            st.tools[3].frame_size = 50;
            st.tools[3].user = &st;
            says(&st, TC("0", "x", "echo", "{}") "|"
                      TC("1", "y", "echo", "{}") "|"
                      TC("2", "z", "nothing", "{}") TCEND);
            says(&st, SAYS("ok"));
            CHECK_INT(perform(&st), LLMCB_OK);
            CHECK_INT(a.asked, 2);
            if (a.wrong) TEST_FAIL("%s", a.wrong);
            CHECK_STR(st.done, cases[i].may ? "echo({}) echo({}) " : "");
            CHECK_INT(count_of(body(&st, 1), "The call was refused."),
                      cases[i].may ? 0 : 2);
            CHECK_INT(count_of(st.w->log, "tool_end:echo!The call was "
                                          "refused. "),
                      cases[i].may ? 0 : 2);
            CHECK_INT(st.w->count[LLMCB_TOOL_ERROR], 0);
            finish(&st);
        }
}

/* Wrong arguments are nothing to ask about. */
TEST(approval_is_asked_for_right_arguments)
{
    asking a;
    stage st;

    memset(&a, 0, sizeof a);
    stage_init(&st, INLINE);
    st.ad.approve = approve;
    st.ad.user = &a;
    st.tools[0].handle_errors = true;
    says(&st, TC("0", "x", "add", "{}") TCEND);
    says(&st, SAYS("ok"));
    CHECK_INT(perform(&st), LLMCB_OK);
    CHECK_INT(a.asked, 0);
    finish(&st);
}

/* Cancelled, or out of time, while it asks: the tool is not called, even if
 * the answer is yes. */
TEST(approval_cut_short)
{
    int k, kind;

    for (k = 0; k < 2; k++)
        for (kind = 0; kind < 2; kind++) {
            asking a;
            stage st;
            llmcb_code code;

            memset(&a, 0, sizeof a);
            a.ms = 1000;
            a.result = LLMCB_DONE;
            stage_init(&st, INLINE);
            st.ad.approve = approve;
            st.ad.user = &a;
            if (kind) {
                st.tools[3].step = NULL;
                st.tools[3].call = echo_call;
            }
            if (k == 1) st.ad.total_ms = 20;
            says(&st, TC("0", "x", "echo", "{}") TCEND);
            says(&st, SAYS("ok"));
            CHECK(stage_open(&st));
            st.op = ask(&st);
            while (!a.asked) turns(&st.s, 1);
            if (k == 0) llmcb_op_cancel(st.op);
            code = llmcb_op_wait(st.op);
            CHECK_INT(code, k == 0 ? LLMCB_ECANCELLED : LLMCB_ETIMEDOUT);
            CHECK_INT(a.refused_by_cancel, 1);
            CHECK_STR(st.done, "");
            finish(&st);
        }
}

/* Who approves may take longer than the tool. */
TEST(approval_is_not_the_time_of_the_tool)
{
    int in_time;

    for (in_time = 0; in_time < 2; in_time++) {
        asking a;
        stage st;

        memset(&a, 0, sizeof a);
        a.ms = 1000;
        a.result = LLMCB_DONE;
        stage_init(&st, INLINE);
        st.ad.approve = approve;
        st.ad.user = &a;
        st.tools[1].timeout_ms = in_time ? 41 : 39;
        says(&st, TC("0", "x", "slow", "{\\\"ms\\\":40}") TCEND);
        says(&st, SAYS("ok"));
        CHECK_INT(perform(&st), in_time ? LLMCB_OK : LLMCB_ETIMEDOUT);
        CHECK_INT(llmcb_loop_now(st.s.loop), in_time ? 1040 : 1039);
        finish(&st);
    }
}

static llmcb_step frameless_step(llmcb_task *t, llmcb_tool_use *use)
{
    did(use);
    return t->frame ? llmcb_tool_fail(use, "a frame")
                    : llmcb_tool_answer(use, llmcb_text("none"));
}

/* What approve has of a frame is not the tool's. */
TEST(a_tool_without_a_frame_behind_approval)
{
    stage st;
    asking a;

    memset(&a, 0, sizeof a);
    a.frame = 32;
    stage_init(&st, INLINE);
    st.ad.approve = approve;
    st.ad.approve_frame = 32;
    st.ad.user = &a;
    st.tools[3].step = frameless_step;
    says(&st, TC("0", "x", "echo", "{}") TCEND);
    says(&st, SAYS("ok"));
    CHECK_INT(perform(&st), LLMCB_OK);
    CHECK(!a.wrong);
    CHECK_INT(a.asked, 1);
    CHECK(strstr(st.w->log, "tool_end:echo=none ") != NULL);
    finish(&st);
}

/* ---- tools that fail ----------------------------------------------------- */

typedef struct failure {
    int result;
    const char *why;
    bool answers;
} failure;

static int fail_call(llmcb_tool_use *use)
{
    const failure *f = (const failure *)use->tool->user;

    if (f->answers) llmcb_tool_answer(use, llmcb_text("half an answer"));
    if (f->why) llmcb_tool_fail(use, f->why);
    return f->result;
}

static llmcb_step fail_step(llmcb_task *t, llmcb_tool_use *use)
{
    (void)t;
    return fail_call(use);
}

TEST(case_099_tools_that_fail)
{
    static const struct {
        failure f;
        llmcb_code code;
        const char *message;
    } cases[] = {
        { { LLMCB_ETOOL, NULL, false }, LLMCB_ETOOL, "a tool failed" },
        { { LLMCB_ETOOL, "no such file", true }, LLMCB_ETOOL,
          "no such file" },
        { { LLMCB_ETOOL, "", false }, LLMCB_ETOOL, "a tool failed" },
        { { LLMCB_ETOOL, "two\nlines\x1b[m", false }, LLMCB_ETOOL,
          "two lines [m" },
        { { LLMCB_ETOOL, "bad \xFF utf", false }, LLMCB_ETOOL, "bad ? utf" },
        { { LLMCB_EIO, NULL, true }, LLMCB_EIO, "the connection broke" },
        { { -4711, NULL, false }, LLMCB_ETOOL, "a tool failed" },
        { { LLMCB_EHANDLER, "why", false }, LLMCB_ETOOL, "why" },
        { { 5, "why", false }, LLMCB_ETOOL, "why" },
    };
    size_t i;
    int kind, handled;

    for (i = 0; i < sizeof cases / sizeof *cases; i++)
        for (kind = 0; kind < 2; kind++)
            for (handled = 0; handled < 2; handled++) {
                failure f = cases[i].f;
                char want[300];
                stage st;

                if (kind && f.result > 0) continue; /* a step's WAIT */
                stage_init(&st, INLINE);
                st.tools[3].step = kind ? fail_step : NULL;
                st.tools[3].call = kind ? NULL : fail_call;
                st.tools[3].user = &f;
                st.tools[3].handle_errors = handled;
                says(&st, TC("0", "x", "echo", "{}") TCEND);
                says(&st, SAYS("ok"));
                CHECK_INT(perform(&st), handled ? LLMCB_OK : cases[i].code);
                if (handled) {
                    sprintf(want, "tool_end:echo!%s ", cases[i].message);
                    CHECK(strstr(st.w->log, want) != NULL);
                    sprintf(want, "\"content\":\"%s\",\"tool_call_id\":\"x\"",
                            cases[i].message);
                    if (!strstr(body(&st, 1), want))
                        TEST_FAIL("no %s in %s", want, body(&st, 1));
                } else {
                    snprintf(want, sizeof want, "echo: %s", cases[i].message);
                    CHECK_STR(llmcb_op_error(st.op)->message, want);
                    CHECK_INT(run_named(st.w, "echo", 0)->code,
                              cases[i].code);
                    CHECK_INT(run_named(st.w, "AgentExecutor", 0)->code,
                              cases[i].code);
                    CHECK(strstr(st.w->log, "tool_error") <
                          strstr(st.w->log, "chain_error:AgentExecutor"));
                }
                CHECK_INT(st.n_bodies, handled ? 2 : 1);
                read_op(st.op);
                finish(&st);
            }
}

/* One fails: the others of its turn are cancelled and get their error. */
static int cancelled_call(llmcb_tool_use *use)
{
    did(use);
    return LLMCB_ECANCELLED;
}

static llmcb_step cancelled_step(llmcb_task *t, llmcb_tool_use *use)
{
    (void)t;
    return cancelled_call(use);
}

/* What a tool with handle_errors says is a cancel of nobody's is a failure like
 * any other. */
TEST(a_tool_that_fails_as_if_cancelled)
{
    int blocking;

    for (blocking = 0; blocking < 2; blocking++) {
        stage st;

        stage_init(&st, INLINE);
        st.tools[3].call = blocking ? cancelled_call : NULL;
        st.tools[3].step = blocking ? NULL : cancelled_step;
        st.tools[3].handle_errors = true;
        says(&st, TC("0", "x", "echo", "{}") TCEND);
        says(&st, SAYS("went on"));
        CHECK_INT(perform(&st), LLMCB_OK);
        CHECK_STR(llmcb_op_output(st.op)->text.ptr, "went on");
        CHECK(strstr(st.w->log, "tool_end:echo!") != NULL);
        CHECK(strstr(body(&st, 1), "\"tool_call_id\":\"x\"") != NULL);
        finish(&st);
    }
}

TEST(a_failure_cancels_the_others)
{
    failure f = { LLMCB_ETOOL, "no", false };
    stage st;

    stage_init(&st, SYNC);
    st.tools[3].step = fail_step;
    st.tools[3].user = &f;
    says(&st, TC("0", "x", "slow", "{\\\"ms\\\":900}") "|"
              TC("1", "y", "echo", "{}") "|"
              TC("2", "z", "slow", "{\\\"ms\\\":900}") TCEND);
    CHECK_INT(perform(&st), LLMCB_ETOOL);
    CHECK_STR(llmcb_op_error(st.op)->message, "echo: no");
    CHECK_INT(run_named(st.w, "slow", 0)->code, LLMCB_ECANCELLED);
    CHECK_INT(run_named(st.w, "slow", 1)->code, LLMCB_ECANCELLED);
    CHECK(llmcb_loop_now(st.s.loop) < 900);
    finish(&st);
}

/* What a tool answers may be any text, and of any size. */
static int bytes_call(llmcb_tool_use *use)
{
    const llmcb_str *s = (const llmcb_str *)use->tool->user;

    llmcb_tool_answer(use, llmcb_text("the last one counts"));
    return llmcb_tool_answer(use, *s);
}

TEST(answers_of_tools)
{
    static char big[300000];
    llmcb_str s;
    stage st;
    int k;

    memset(big, 'x', sizeof big);
    for (k = 0; k < 5; k++) {
        s.ptr = k == 0 ? "a\0b" : k == 1 ? "" : k == 2 ? NULL
                : k == 3 ? big : "\xFF";
        s.len = k == 0 ? 3 : k == 3 ? sizeof big : k == 4;
        stage_init(&st, INLINE);
        st.tools[3].step = NULL;
        st.tools[3].call = bytes_call;
        st.tools[3].user = &s;
        says(&st, TC("0", "x", "echo", "{}") TCEND);
        says(&st, SAYS("ok"));
        CHECK_INT(perform(&st), LLMCB_OK);
        if (k == 0) CHECK(strstr(body(&st, 1), "\"a\\u0000b\"") != NULL);
        if (k == 1 || k == 2)
            CHECK(strstr(body(&st, 1), "{\"role\":\"tool\",\"content\":\"\","
                                       "\"tool_call_id\"") != NULL);
        if (k == 3) CHECK(strlen(body(&st, 1)) > sizeof big);
        if (k == 4) CHECK(strstr(body(&st, 1), "\xEF\xBF\xBD") != NULL);
        read_op(st.op);
        finish(&st);
    }
}

/* ---- time limits of tools ------------------------------------------------ */

TEST(timeout_of_a_coroutine)
{
    int handled;

    for (handled = 0; handled < 2; handled++) {
        stage st;

        stage_init(&st, ASYNC);
        st.tools[1].timeout_ms = 50;
        st.tools[1].handle_errors = handled;
        says(&st, TC("0", "x", "slow", "{\\\"ms\\\":100}") "|"
                  TC("1", "y", "slow", "{\\\"ms\\\":40}") TCEND);
        says(&st, SAYS("ok"));
        CHECK_INT(perform(&st), handled ? LLMCB_OK : LLMCB_ETIMEDOUT);
        CHECK(strstr(st.w->log, "tool_end:slow=slept 40 ") != NULL);
        CHECK(strstr(st.w->log,
                     handled ? "tool_end:slow!the run took longer than "
                               "timeout_ms "
                             : "tool_error:slow=ETIMEDOUT ") != NULL);
        if (!handled)
            CHECK_INT(llmcb_op_error(st.op)->detail, LLMCB_DETAIL_TOTAL);
        CHECK_INT(llmcb_loop_now(st.s.loop), 50);
        finish(&st);
    }
}

/* A blocking function that is given up goes on; what it says afterwards
 * reaches nobody, and its memory stays as long as it needs it. */
static gate late_gate = GATE;
static pthread_mutex_t late_mutex = PTHREAD_MUTEX_INITIALIZER;
static unsigned late_done;

/* How often a late function has come to its end, with these. */
static unsigned late_ends(unsigned more)
{
    unsigned n;

    pthread_mutex_lock(&late_mutex);
    n = late_done += more;
    pthread_mutex_unlock(&late_mutex);
    return n;
}

static int late_call(llmcb_tool_use *use)
{
    char big[600];
    llmcb_str s;
    int i;

    did(use);
    llmcb_run_text(use->run, llmcb_text("early"));
    gate_pass(&late_gate);
    memset(big, 'y', sizeof big);
    s.ptr = big;
    s.len = sizeof big;
    for (i = 0; i < 3; i++) {
        llmcb_tool_answer(use, s);
        llmcb_tool_fail(use, "too late");
        llmcb_tool_text(use, "t", &s);
        llmcb_run_text(use->run, llmcb_text("late"));
        llmcb_run_custom(use->run, "late", llmcb_text("late"));
        llmcb_run_child(use->run, NULL);
    }
    late_ends(1);
    return LLMCB_ETOOL;
}

TEST(timeout_of_a_blocking_function)
{
    static const mode modes[] = { INLINE, ASYNC, SYNC };
    int k, handled, when;

    for (k = 0; k < 3; k++)
        for (handled = 0; handled < 2; handled++)
            for (when = 0; when < 4; when++) {
                stage st;
                unsigned came = gate_came(&late_gate);

                stage_init(&st, modes[k]);
                st.tools[2].call = late_call;
                st.tools[2].timeout_ms = 50;
                st.tools[2].handle_errors = handled;
                says(&st, TC("0", "x", "gate", "{\\\"t\\\":\\\"u\\\"}")
                          TCEND);
                says(&st, SAYS("ok"));
                CHECK(stage_open(&st));
                st.op = ask(&st);
                turn_to_gate(&st.s, &late_gate, came + 1);
                llmcb_clock_advance(st.s.loop, 49);
                turns(&st.s, 20);
                CHECK(!llmcb_op_done(st.op));
                CHECK_INT(st.w->count[LLMCB_TOOL_ERROR] +
                              st.w->count[LLMCB_TOOL_END],
                          0);
                llmcb_clock_advance(st.s.loop, 1);
                if (when == 0) gate_let(&late_gate, 1);
                llmcb_op_wait(st.op);
                if (when) { /* else it may have been in time */
                    CHECK_INT(llmcb_op_code(st.op),
                              handled ? LLMCB_OK : LLMCB_ETIMEDOUT);
                    CHECK_INT(st.w->count[LLMCB_TEXT], 2 + handled);
                }
                if (when == 1) gate_let(&late_gate, 1);
                if (when < 3) {
                    llmcb_op_free(st.op);
                    st.op = NULL;
                }
                turns(&st.s, 3);
                if (when >= 2) gate_let(&late_gate, 1);
                /* loop_free waits for the function */
                st.op = NULL;
                stage_close(&st);
            }
    CHECK_INT(late_ends(0), 24);
}

/* What the op shows stays as it was when the tool was given up. */
TEST(a_late_answer_is_not_taken)
{
    llmcb_tool tool = gate_tool;
    stage st;
    int handled;

    for (handled = 0; handled < 2; handled++) {
        const char *want = handled ? "the run took longer than timeout_ms"
                                   : "";
        stage_init(&st, INLINE);
        tool.timeout_ms = 50;
        tool.handle_errors = handled;
        says(&st, "x" DONE);
        CHECK(stage_open(&st));
        st.op = use(&st, &tool, "{}");
        turn_to_gate(&st.s, &st.gate, 1);
        llmcb_clock_advance(st.s.loop, 50);
        llmcb_op_wait(st.op);
        CHECK_STR(llmcb_op_output(st.op)->text.ptr, want);
        gate_let(&st.gate, ALL);
        while (((llmcbi_work *)(void *)st.op)->use->job) /* it returns */
            llmcb_loop_run_once(st.s.loop, -1);
        CHECK_STR(llmcb_op_output(st.op)->text.ptr, want);
        CHECK_INT(llmcb_op_output(st.op)->failed, handled);
        finish(&st);
    }
}

static llmcb_code told_late;

static int telling_call(llmcb_tool_use *use)
{
    gate_pass(&on_stage->gate);
    told_late = llmcb_run_text(use->run, llmcb_text("late"));
    return 0;
}

/* Its run has ended, whoever was told so, and how. */
TEST(a_late_text_of_a_tool_is_refused)
{
    static const mode modes[] = { INLINE, ASYNC, SYNC, SYNC };
    int k;

    for (k = 0; k < 4; k++) {
        llmcb_tool tool = gate_tool;
        stage st;

        stage_init(&st, modes[k]);
        if (k == 3) st.config.n_callbacks = 0;
        tool.call = telling_call;
        tool.timeout_ms = 50;
        told_late = LLMCB_OK;
        says(&st, "x" DONE);
        CHECK(stage_open(&st));
        st.op = use(&st, &tool, "{}");
        turn_to_gate(&st.s, &st.gate, 1);
        llmcb_clock_advance(st.s.loop, 50);
        CHECK_INT(llmcb_op_wait(st.op), LLMCB_ETIMEDOUT);
        gate_let(&st.gate, ALL);
        finish(&st); /* which waits until it has returned */
        CHECK_INT(told_late, LLMCB_ESTATE);
    }
}

/* ---- a blocking tool that is left behind --------------------------------- */

/* The agent is cancelled, freed, or goes with its loop, while the function
 * runs; it returns before, between and after. */
TEST(blocking_tool_outlives_its_agent)
{
    static const mode modes[] = { INLINE, ASYNC, SYNC };
    int k, how, when;

    for (k = 0; k < 3; k++)
        for (how = 0; how < 3; how++)
            for (when = 0; when < 2; when++) {
                stage st;
                unsigned came = gate_came(&late_gate);

                stage_init(&st, modes[k]);
                st.tools[2].call = late_call;
                says(&st, TC("0", "x", "gate", "{}") "|"
                          TC("1", "y", "gate", "{}") "|"
                          TC("2", "z", "slow", "{}") TCEND);
                CHECK(stage_open(&st));
                st.op = ask(&st);
                turn_to_gate(&st.s, &late_gate, came + 2);
                if (how == 0) {
                    llmcb_op_cancel(st.op);
                    CHECK_INT(llmcb_op_wait(st.op), LLMCB_ECANCELLED);
                    CHECK_INT(run_named(st.w, "gate", 1)->code,
                              LLMCB_ECANCELLED);
                }
                if (how < 2) {
                    llmcb_op_free(st.op);
                    st.op = NULL;
                    if (when) turns(&st.s, 10);
                }
                gate_let(&late_gate, 2);
                if (!when) turns(&st.s, 10);
                stage_close(&st);
            }
}

static int stuck_call(llmcb_tool_use *use)
{
    llmcb_run_text(use->run, llmcb_text("early"));
    gate_pass(&late_gate);
    llmcb_tool_answer(use, llmcb_text("after the loop is gone"));
    llmcb_tool_fail(use, "why");
    llmcb_run_text(use->run, llmcb_text("late"));
    late_ends(1);
    return 0;
}

/* Beyond shutdown_ms: the loop goes, what the function uses stays. */
TEST(blocking_tool_stuck_when_the_loop_goes)
{
    static stage *left[2]; /* what leaks can be reached */
    int how;

    for (how = 0; how < 2; how++) {
        stage *st = left[how] = (stage *)calloc(1, sizeof *st);
        unsigned came = gate_came(&late_gate), i;
        unsigned before_it = late_ends(0);
        wit *w;

        if (!st) abort();
        stage_init(st, how ? SYNC : INLINE);
        st->tools[2].call = stuck_call;
        st->s.ld.shutdown_ms = 30;
        says(st, TC("0", "x", "gate", "{}") "|" TC("1", "y", "slow", "{}")
             TCEND);
        CHECK(stage_open(st));
        st->op = ask(st);
        turn_to_gate(&st->s, &late_gate, came + 1);
        llmcb_chat_free(st->s.chat);
        CHECK_INT(llmcb_loop_free(st->s.loop), LLMCB_ETIMEDOUT);
        w = st->w;
        CHECK_WIT(w);
        CHECK_INT(run_named(w, "gate", 0)->code, LLMCB_ECANCELLED);
        CHECK_INT(run_named(w, "AgentExecutor", 0)->code, LLMCB_ECANCELLED);
        gate_let(&late_gate, 1);
        while (late_ends(0) == before_it)
            continue;
        for (i = 0; i < st->n_bodies; i++) free(st->bodies[i]);
        for (i = 0; i < st->s.n_tapes; i++) {
            free(st->s.bytes[i]);
            free(st->s.segments[i]);
        }
    }
}

/* One that waits for a thread is not called any more. */
TEST(blocking_tool_is_withdrawn)
{
    stage st;
    int how;

    for (how = 0; how < 2; how++) {
        unsigned came;
        stage_init(&st, INLINE);
        st.s.ld.workers = 2;
        says(&st, TC("0", "x", "gate", "{\\\"n\\\":1}") "|"
                  TC("1", "y", "gate", "{\\\"n\\\":2}") "|"
                  TC("2", "z", "gate", "{\\\"n\\\":3}") TCEND);
        CHECK(stage_open(&st));
        st.op = ask(&st);
        came = gate_came(&st.gate);
        turn_to_gate(&st.s, &st.gate, came + 1);
        if (how) {
            llmcb_op_free(st.op);
            st.op = NULL;
        } else {
            llmcb_op_cancel(st.op);
            llmcb_op_wait(st.op);
        }
        turns(&st.s, 10);
        gate_let(&st.gate, ALL);
        CHECK_INT(count_of(st.done, "gate("), 1);
        finish(&st);
    }
}

/* ---- tools with work of their own ---------------------------------------- */

typedef struct nest {
    llmcb_op *op, *chat, *agent;
    llmcb_agent_desc inner;
} nest;

static llmcb_step nest_step(llmcb_task *t, llmcb_tool_use *use)
{
    nest *n = (nest *)use->tool->user;
    llmcb_config config;
    llmcb_message m;
    llmcb_run_desc d;

    LLMCB_BEGIN(t);
    did(use);
    CHECK(llmcb_task_run(t) == use->run);
    memset(&d, 0, sizeof d);
    d.name = "work";
    config = llmcb_run_child(use->run, NULL);
    n->op = llmcb_run_start(llmcb_task_loop(t), &d, &config);
    config = llmcb_run_child(llmcb_op_run(n->op), "inner");
    memset(&m, 0, sizeof m);
    m.content = "inner";
    n->chat = llmcb_chat_generate(on_stage->s.chat, &m, 1, &config);
    CHECK_INT(llmcb_run_text(use->run, llmcb_text("from the tool")), 0);
    CHECK_INT(llmcb_run_end(use->run, llmcb_text("x")), LLMCB_ESTATE);
    LLMCB_AWAIT(t, llmcb_await(t, n->chat));
    llmcb_run_end(llmcb_op_run(n->op), llmcb_text("worked"));
    if (t->result == LLMCB_OK) {
        llmcb_tool_answer(use,
                          llmcb_op_result(n->chat)->generations[0].text);
        memset(&m, 0, sizeof m);
        m.content = "an agent in a tool";
        config = llmcb_run_child(use->run, NULL);
        n->agent = llmcb_agent_start(&n->inner, &m, 1, &config);
        LLMCB_AWAIT(t, llmcb_await(t, n->agent));
    }
    llmcb_op_free(n->op);
    llmcb_op_free(n->chat);
    llmcb_op_free(n->agent);
    return t->result;
    LLMCB_END(t);
}

TEST(tools_start_runs_calls_and_agents)
{
    static const mode modes[] = { INLINE, ASYNC, SYNC };
    int k;

    for (k = 0; k < 3; k++) {
        stage st;
        wit *w;
        nest n;

        memset(&n, 0, sizeof n);
        stage_init(&st, modes[k]);
        st.tools[3].step = nest_step;
        st.tools[3].user = &n;
        says(&st, TC("0", "x", "echo", "{}") TCEND);
        says(&st, SAYS("in"));
        says(&st, ONE_TOOL);
        says(&st, SAYS("inner answer"));
        says(&st, SAYS("out"));
        CHECK(stage_open(&st));
        n.inner = st.ad;
        n.inner.n_tools = 1;
        st.op = ask(&st);
        CHECK_INT(llmcb_op_wait(st.op), LLMCB_OK);
        w = st.w;
        CHECK_STR(llmcb_op_output(st.op)->text.ptr, "out");
        CHECK(strstr(body(&st, 4), "\"content\":\"in\",\"tool_call_id\":"
                                   "\"x\"") != NULL);
        CHECK_STR(run_named(w, "work", 0)->parent,
                  run_named(w, "echo", 0)->id);
        CHECK_STR(run_named(w, "ChatOpenAI", 1)->parent,
                  run_named(w, "work", 0)->id);
        CHECK_STR(run_named(w, "ChatOpenAI", 1)->tag, "inner");
        CHECK_STR(run_named(w, "AgentExecutor", 1)->parent,
                  run_named(w, "echo", 0)->id);
        CHECK_STR(run_named(w, "add", 0)->parent,
                  run_named(w, "AgentExecutor", 1)->id);
        finish(&st);
    }
}

/* Cancelled deep inside. */
TEST(case_100_cancelled_tools_get_one_error)
{
    stage st;

    stage_init(&st, INLINE);
    says(&st, TC("0", "x", "slow", "{\\\"ms\\\":-1}") TCEND);
    CHECK(stage_open(&st));
    st.op = ask(&st);
    while (!*st.done) turns(&st.s, 1);
    llmcb_op_cancel(st.op);
    CHECK_INT(llmcb_op_wait(st.op), LLMCB_ECANCELLED);
    CHECK_INT(llmcb_op_error(st.op)->detail, LLMCB_DETAIL_CALLER);
    CHECK_INT(st.w->count[LLMCB_TOOL_ERROR], 1);
    CHECK_INT(st.w->count[LLMCB_TOOL_END], 0);
    CHECK_INT(run_named(st.w, "slow", 0)->code, LLMCB_ECANCELLED);
    CHECK(strstr(st.w->log, "tool_error:slow=ECANCELLED "
                            "chain_error:AgentExecutor=ECANCELLED ") != NULL);
    finish(&st);
    /* a tool of its own, handled errors or not */
    for (int handled = 0; handled < 2; handled++) {
        llmcb_tool tool = nap_tool;
        stage_init(&st, INLINE);
        tool.handle_errors = handled;
        says(&st, "x" DONE);
        CHECK(stage_open(&st));
        st.op = use(&st, &tool, "{\"ms\":-1}");
        turns(&st.s, 5);
        llmcb_op_cancel(st.op);
        CHECK_INT(llmcb_op_wait(st.op), LLMCB_ECANCELLED);
        CHECK_INT(st.w->count[LLMCB_TOOL_ERROR], 1);
        CHECK_INT(st.w->count[LLMCB_TOOL_END], 0);
        finish(&st);
    }
}

/* ---- limits of the agent ------------------------------------------------- */

TEST(max_turns)
{
    stage st;
    size_t n;

    stage_init(&st, INLINE);
    st.ad.max_turns = 3;
    says(&st, ONE_TOOL); /* again and again */
    CHECK_INT(perform(&st), LLMCB_ELIMIT);
    CHECK_INT(st.n_bodies, 3);
    CHECK_INT(st.w->count[LLMCB_TOOL_END], 3);
    CHECK_INT(st.w->count[LLMCB_AGENT_FINISH], 1);
    CHECK_INT(st.w->count[LLMCB_CHAIN_ERROR], 0);
    CHECK_INT(run_named(st.w, "AgentExecutor", 0)->finish, LLMCB_CHAIN_END);
    CHECK(strstr(llmcb_op_output(st.op)->text.ptr, "limit") != NULL);
    llmcb_agent_messages(st.op, &n);
    CHECK_INT(n, 7);
    CHECK_INT(llmcb_op_usage(st.op).total_tokens, 15);
    finish(&st);
    stage_init(&st, INLINE); /* the default */
    says(&st, ONE_TOOL);
    CHECK_INT(perform(&st), LLMCB_ELIMIT);
    CHECK_INT(st.n_bodies, 15);
    finish(&st);
}

TEST(case_101_total_ms)
{
    static const mode modes[] = { INLINE, ASYNC, SYNC };
    int k, phase;

    for (k = 0; k < 3; k++)
        for (phase = 0; phase < 2; phase++) {
            stage st;

            stage_init(&st, modes[k]);
            st.ad.total_ms = 100;
            st.config.tags = NULL;
            if (phase) /* in the tools */
                says(&st, TC("0", "x", "slow", "{\\\"ms\\\":900}") "|"
                          TC("1", "y", "slow", "{\\\"ms\\\":50}") TCEND);
            else /* in the model's call, of which a part has come */
                scene_tape(&st.s, OK_HEAD, "some|where|in|between" DONE, 40,
                           LLMCB_REPLAY_KEEP);
            CHECK_INT(perform(&st), LLMCB_ETIMEDOUT);
            CHECK_INT(llmcb_op_error(st.op)->detail, LLMCB_DETAIL_TOTAL);
            CHECK_INT(llmcb_loop_now(st.s.loop), 100);
            CHECK_INT(st.w->count[LLMCB_AGENT_FINISH], 1);
            CHECK_INT(run_named(st.w, "AgentExecutor", 0)->finish,
                      LLMCB_CHAIN_END);
            CHECK_INT(st.n_bodies, 1);
            if (phase) {
                CHECK(strstr(st.w->log, "tool_end:slow=slept 50 "
                                        "tool_error:slow=ECANCELLED "
                                        "agent_finish:AgentExecutor "
                                        "chain_end:AgentExecutor ") != NULL);
            } else {
                CHECK(strstr(st.w->log, "llm_error:ChatOpenAI=ECANCELLED "
                                        "chain_error:RunnableSequence="
                                        "ECANCELLED "
                                        "agent_finish:AgentExecutor "
                                        "chain_end:AgentExecutor ") != NULL);
                /* what there was of the last call */
                CHECK_INT(llmcb_op_result(st.op)->n_generations, 1);
                if (llmcb_op_result(st.op)->n_generations)
                    CHECK_STR(
                        llmcb_op_result(st.op)->generations[0].text.ptr,
                        "somewhere");
                CHECK(!llmcb_op_usage(st.op).known);
            }
            CHECK(strstr(llmcb_op_output(st.op)->text.ptr, "limit") != NULL);
            read_op(st.op);
            finish(&st);
        }
}

/* The longest time there is ends nothing. */
TEST(total_ms_of_any_size)
{
    stage st;

    stage_init(&st, INLINE);
    st.ad.total_ms = st.tools[1].timeout_ms = INT64_MAX;
    says(&st, TWO_TOOLS);
    says(&st, SAYS("ok"));
    CHECK(stage_open(&st));
    llmcb_clock_advance(st.s.loop, 100);
    turns(&st.s, 1);
    st.op = ask(&st);
    CHECK_INT(llmcb_op_wait(st.op), LLMCB_OK);
    finish(&st);
}

/* A blocking tool does not keep it beyond its time. */
TEST(case_101_total_ms_of_a_blocking_tool)
{
    stage st;

    stage_init(&st, INLINE);
    st.ad.total_ms = 100;
    says(&st, TC("0", "x", "gate", "{}") TCEND);
    CHECK(stage_open(&st));
    st.op = ask(&st);
    turn_to_gate(&st.s, &st.gate, 1);
    llmcb_clock_advance(st.s.loop, 100);
    CHECK_INT(llmcb_op_wait(st.op), LLMCB_ETIMEDOUT);
    CHECK(strstr(st.w->log, "tool_error:gate=ECANCELLED "
                            "agent_finish:AgentExecutor ") != NULL);
    gate_let(&st.gate, ALL);
    finish(&st);
}

/* The time is over before the tools begin, since handlers took it. */
TEST(case_101_total_ms_spent_by_handlers)
{
    stage st;

    stage_init(&st, ASYNC);
    st.w->ms = 200;
    st.ad.total_ms = 1600; /* they act at 1800, the tools begin at 2000 */
    says(&st, TC("0", "x", "slow", "{\\\"ms\\\":-1}") TCEND);
    CHECK_INT(perform(&st), LLMCB_ETIMEDOUT);
    CHECK(strstr(st.w->log, "tool_error:slow=ECANCELLED ") != NULL);
    CHECK_INT(st.w->count[LLMCB_AGENT_FINISH], 1);
    finish(&st);
}

/* Sleeps for ever, and "ms" when it is cancelled. */
static llmcb_step tidy_step(llmcb_task *t, llmcb_tool_use *use)
{
    int64_t ms = 0;

    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_sleep(t, LLMCB_FOREVER));
    if (t->result != LLMCB_ECANCELLED || !llmcb_tool_int(use, "ms", &ms))
        return LLMCB_EINVAL;
    LLMCB_AWAIT(t, llmcb_sleep(t, ms));
    if (t->result == LLMCB_OK) did(use);
    return LLMCB_ECANCELLED;
    LLMCB_END(t);
}

/* A tool that cleans up is not cancelled again when another has ended. */
TEST(total_ms_cancels_each_tool_once)
{
    stage st;

    stage_init(&st, INLINE);
    st.ad.total_ms = 50;
    st.tools[1].step = tidy_step;
    says(&st, TC("0", "x", "slow", "{\\\"ms\\\":10}") "|"
              TC("1", "y", "slow", "{\\\"ms\\\":20}") "|"
              TC("2", "z", "slow", "{\\\"ms\\\":30}") TCEND);
    CHECK_INT(perform(&st), LLMCB_ETIMEDOUT);
    CHECK_STR(st.done, "slow({\"ms\":10}) slow({\"ms\":20}) "
                       "slow({\"ms\":30}) ");
    CHECK_INT(llmcb_loop_now(st.s.loop), 80);
    finish(&st);
}

/* What the program began within the agent's run and left open is cancelled
 * too, also if it began while the agent stops. */
static int opens_run(wit *w, const llmcb_event *ev)
{
    llmcb_config config;
    llmcb_op *op;

    if (ev->kind != w->at || w->acted++) return 0;
    config = llmcb_run_child(llmcb_op_run(*w->op), NULL);
    op = llmcb_run_start(on_stage->s.loop, NULL, &config);
    on_stage->callbacks[3] = (llmcb_handler *)(void *)op;
    return 0;
}

TEST(runs_left_open_do_not_keep_a_stopped_agent)
{
    static const llmcb_event_kind at[] = { LLMCB_TOOL_START,
                                           LLMCB_TOOL_ERROR };
    size_t i;

    for (i = 0; i < 2; i++) {
        stage st;
        int k;

        stage_init(&st, INLINE);
        st.ad.total_ms = 100;
        st.w->act = opens_run;
        st.w->at = at[i];
        says(&st, TC("0", "x", "slow", "{\\\"ms\\\":900}") TCEND);
        CHECK(stage_open(&st));
        st.op = ask(&st);
        for (k = 0; k < 200 && !llmcb_op_done(st.op); k++)
            llmcb_loop_run_once(st.s.loop, 0);
        CHECK_INT(llmcb_op_code(st.op), LLMCB_ETIMEDOUT);
        llmcb_op_free((llmcb_op *)(void *)st.callbacks[3]);
        finish(&st);
    }
}

/* Ended before its start was told: what is within it is waited for. */
TEST(a_run_ended_before_it_began)
{
    static const mode modes[] = { INLINE, ASYNC, SYNC };
    int k, n;

    for (k = 0; k < 3; k++)
        for (n = 0; n < 12; n++) {
            llmcb_message m;
            llmcb_config config;
            llmcb_op *child;
            stage st;

            stage_init(&st, modes[k]);
            says(&st, "x" DONE);
            CHECK(stage_open(&st));
            memset(&m, 0, sizeof m);
            m.content = "hi";
            st.op = llmcb_run_start(st.s.loop, NULL, &st.config);
            config = llmcb_run_child(llmcb_op_run(st.op), NULL);
            child = llmcb_chat_generate(st.s.chat, &m, 1, &config);
            turns(&st.s, n);
            llmcb_run_end(llmcb_op_run(st.op), llmcb_text("end"));
            CHECK_INT(llmcb_op_wait(st.op), LLMCB_OK);
            CHECK_INT(llmcb_op_code(child), LLMCB_OK);
            llmcb_op_free(child);
            finish(&st);
        }
}

/* An agent has no chunks to read. */
static llmcb_step awaits_chunk(llmcb_task *t)
{
    stage *st = (stage *)t->self;

    LLMCB_BEGIN(t);
    while (!llmcb_op_done(st->op)) {
        LLMCB_AWAIT(t, llmcb_await_chunk(t, st->op));
        LLMCB_AWAIT(t, llmcb_sleep(t, 1));
    }
    LLMCB_END(t);
}

TEST(chunks_of_an_agent)
{
    const llmcb_chunk *chunk;
    llmcb_op *other;
    stage st;

    stage_init(&st, ASYNC);
    st.w->ms = 3;
    says(&st, TWO_TOOLS);
    says(&st, SAYS("ok"));
    CHECK(stage_open(&st));
    st.op = ask(&st);
    other = llmcb_task_start(st.s.loop, awaits_chunk, 0, &st);
    CHECK_INT(llmcb_op_wait(st.op), LLMCB_OK);
    turns(&st.s, 5);
    CHECK_INT(llmcb_op_code(other), LLMCB_OK);
    CHECK(!llmcb_op_next(st.op, &chunk));
    llmcb_op_free(other);
    llmcb_op_free(st.op);
    st.op = ask(&st); /* the last tape again */
    while (llmcb_op_next(st.op, &chunk)) continue;
    CHECK_INT(llmcb_op_wait(st.op), LLMCB_OK);
    finish(&st);
}

/* ---- agents among others ------------------------------------------------- */

static llmcb_step asks_agent(llmcb_task *t)
{
    stage *st = (stage *)t->self;
    llmcb_message m;
    llmcb_config config;

    LLMCB_BEGIN(t);
    memset(&m, 0, sizeof m);
    m.content = "hi";
    config = st->config;
    if (llmcb_task_run(t))
        config = llmcb_run_child(llmcb_task_run(t), "seq:step:2");
    st->op = llmcb_agent_start(&st->ad, &m, 1, &config);
    LLMCB_AWAIT(t, llmcb_await(t, st->op));
    if (t->result != LLMCB_OK) return t->result;
    if (llmcb_task_run(t))
        llmcb_run_end(llmcb_task_run(t), llmcb_op_output(st->op)->text);
    LLMCB_END(t);
}

TEST(agent_in_a_chain_and_in_a_coroutine)
{
    int k, fails;

    for (k = 0; k < 2; k++)
        for (fails = 0; fails < 2; fails++) {
            stage st;
            llmcb_run_desc d;
            llmcb_op *outer;
            llmcb_config config;

            stage_init(&st, INLINE);
            st.ad.max_turns = fails ? 1 : 2;
            says(&st, ONE_TOOL);
            says(&st, SAYS("ok"));
            CHECK(stage_open(&st));
            memset(&d, 0, sizeof d);
            d.name = "outer";
            d.body = asks_agent;
            d.self = &st;
            config = st.config;
            outer = k ? llmcb_run_start(st.s.loop, &d, &config)
                      : llmcb_task_start(st.s.loop, asks_agent, 0, &st);
            CHECK_INT(llmcb_op_wait(outer),
                      fails ? LLMCB_ELIMIT : LLMCB_OK);
            if (k) {
                CHECK_STR(run_named(st.w, "AgentExecutor", 0)->parent,
                          run_named(st.w, "outer", 0)->id);
                CHECK_STR(run_named(st.w, "AgentExecutor", 0)->tag,
                          "seq:step:2");
                if (!fails)
                    CHECK_STR(llmcb_op_output(outer)->text.ptr, "ok");
            }
            llmcb_op_free(outer);
            finish(&st);
        }
}

/* What is local to the call serves the agent's run and no other. */
TEST(local_callbacks_and_inheritance)
{
    static const char *const tags[] = { "t" }, *const local[] = { "l" };
    llmcb_handler *own[1];
    stage st;
    wit *w = wit_new(INLINE);

    stage_init(&st, INLINE);
    own[0] = &w->h;
    st.config.local_callbacks = own;
    st.config.n_local_callbacks = 1;
    st.config.tags = tags;
    st.config.n_tags = 1;
    st.config.local_tags = local;
    st.config.n_local_tags = 1;
    says(&st, ONE_TOOL);
    says(&st, SAYS("ok"));
    CHECK_INT(perform(&st), LLMCB_OK);
    CHECK_STR(w->log, "chain_start:AgentExecutor "
                      "agent_action:add({\"a\":40,\"b\":2}) "
                      "agent_finish:AgentExecutor chain_end:AgentExecutor ");
    CHECK_STR(run_named(st.w, "AgentExecutor", 0)->tag, "l");
    CHECK_STR(run_named(st.w, "add", 0)->tag, "t");
    CHECK_WIT(w);
    finish(&st);
    free(w);
}

/* What is asked need not end with a NUL, and there need be no configuration. */
static int keep_input(llmcb_handler *h, const llmcb_event *ev)
{
    snprintf((char *)h->user, 64, "%s", ev->start->input.ptr);
    return 0;
}

TEST(a_question_of_a_length)
{
    llmcb_handler h;
    llmcb_message m;
    char input[64] = "";
    stage st;

    stage_init(&st, INLINE);
    says(&st, SAYS("ok"));
    CHECK(stage_open(&st));
    memset(&m, 0, sizeof m);
    m.content = "what is asked, and no more";
    m.content_len = strlen("what is asked");
    memset(&h, 0, sizeof h);
    h.flags = LLMCB_INLINE;
    h.sync.on_chain_start = keep_input;
    h.user = input;
    CHECK_INT(llmcb_loop_hook(st.s.loop, &h), LLMCB_OK);
    st.op = llmcb_agent_start(&st.ad, &m, 1, NULL);
    CHECK_INT(llmcb_op_wait(st.op), LLMCB_OK);
    CHECK_STR(llmcb_op_text(st.op).ptr, "ok");
    CHECK_STR(input, "what is asked");
    CHECK(strstr(st.s.spy.body, "what is asked\""));
    CHECK(!strstr(st.s.spy.body, "no more"));
    finish(&st);
}

TEST(bad_arguments_of_an_agent)
{
    static const char *const names[] = {
        "no name", "both", "neither", "parameters", "utf8", "twice", "extra",
        "no messages", "no list", "handler", "NULL messages", "a message",
        "NULL name", "name's utf8", "chat"
    };
    llmcb_agent_desc no_chat;
    size_t i;

    CHECK(llmcb_agent_start(NULL, NULL, 0, NULL) == NULL);
    memset(&no_chat, 0, sizeof no_chat);
    CHECK(llmcb_agent_start(&no_chat, NULL, 0, NULL) == NULL);
    CHECK(llmcb_tool_start(NULL, NULL, NULL, NULL) == NULL);
    CHECK(llmcb_agent_messages(NULL, NULL) == NULL);
    CHECK_INT(llmcb_op_usage(NULL).known, 0);
    for (i = 0; i < sizeof names / sizeof *names; i++) {
        stage st;
        llmcb_message m;
        size_t n = 1;

        stage_init(&st, INLINE);
        memset(&m, 0, sizeof m);
        m.content = "hi";
        if (i == 0) st.tools[1].name = "";
        if (i == 1) st.tools[1].call = echo_call;
        if (i == 2) st.tools[1].step = NULL;
        if (i == 3) st.tools[1].parameters = "[]";
        if (i == 4) st.tools[1].description = "\xFF";
        if (i == 5) st.tools[1].name = "add";
        if (i == 6) st.config.extra = "7";
        if (i == 7) n = 0;
        if (i == 8) st.ad.tools = NULL;
        if (i == 9) st.config.callbacks = NULL;
        if (i == 11) m.content = "\xFF";
        if (i == 12) st.tools[1].name = NULL;
        if (i == 13) st.tools[1].name = "\xFF";
        if (i == 14) st.s.cd.base_url = "gopher://x";
        says(&st, SAYS("ok"));
        CHECK(stage_open(&st));
        st.op = llmcb_agent_start(&st.ad, i == 10 ? NULL : &m, n, &st.config);
        if (i < 14) {
            CHECK(llmcb_op_done(st.op));
            CHECK_INT(llmcb_op_code(st.op), LLMCB_EINVAL);
            CHECK_INT(st.w->events, 0);
        } else { /* every call fails with it, inside */
            CHECK(llmcb_op_wait(st.op) != LLMCB_OK);
            CHECK_INT(st.w->count[LLMCB_CHAIN_ERROR], 2);
        }
        CHECK_STR(llmcb_op_output(st.op)->text.ptr, "");
        read_op(st.op);
        finish(&st);
    }
}

/* A tool that is refused by llmcb_tool_start, and the least one. */
TEST(tool_start_on_its_own)
{
    llmcb_tool tool = echo_tool;
    stage st;

    stage_init(&st, INLINE);
    says(&st, "x" DONE);
    CHECK(stage_open(&st));
    st.op = llmcb_tool_start(st.s.loop, NULL, NULL, &st.config);
    CHECK_INT(llmcb_op_wait(st.op), LLMCB_EINVAL);
    llmcb_op_free(st.op);
    st.op = llmcb_tool_start(st.s.loop, &tool, NULL, &st.config);
    CHECK_INT(llmcb_op_wait(st.op), LLMCB_OK);
    CHECK_STR(llmcb_op_output(st.op)->text.ptr, "{}");
    llmcb_op_free(st.op);
    tool.step = NULL;
    tool.call = echo_call;
    st.op = llmcb_tool_start(st.s.loop, &tool, NULL, NULL);
    CHECK_INT(llmcb_op_wait(st.op), LLMCB_OK);
    CHECK_STR(llmcb_op_output(st.op)->text.ptr, "{}");
    finish(&st);
}

/* ---- many calls, large calls --------------------------------------------- */

TEST(many_calls_and_small_windows)
{
    static const mode modes[] = { INLINE, ASYNC, SYNC };
    static char pieces[40000];
    int k, i;

    pieces[0] = '\0';
    for (i = 0; i < 128; i++)
        sprintf(pieces + strlen(pieces),
                TC("%d", "k%d", "%s", "{\\\"ms\\\":%d}") "|", i, i,
                i % 3 ? "slow" : "echo", i % 7);
    strcat(pieces, &TCEND[1]);
    for (k = 0; k < 6; k++) {
        stage st;
        const char *at;
        char want[40];

        stage_init(&st, modes[k % 3]);
        if (k >= 3) st.w->h.flags |= LLMCB_AWAIT_EACH;
        if (k % 3 == 1) st.w->ms = 1;
        st.s.cd.limits.window_events = 2;
        st.s.cd.limits.window_bytes = 100;
        st.tools[3].step = NULL;
        st.tools[3].call = echo_call;
        says(&st, pieces);
        says(&st, SAYS("ok"));
        CHECK_INT(perform(&st), LLMCB_OK);
        CHECK_INT(st.w->count[LLMCB_AGENT_ACTION], 128);
        CHECK_INT(st.w->count[LLMCB_TOOL_END], 128);
        for (i = 0, at = body(&st, 1); at && i < 128; i++) {
            sprintf(want, "\"tool_call_id\":\"k%d\"", i);
            at = strstr(at, want);
        }
        CHECK(at != NULL);
        finish(&st);
    }
}

/* Another coroutine that waits for the agent's handlers changes nothing. */
static llmcb_step awaits_run(llmcb_task *t)
{
    stage *st = (stage *)t->self;

    LLMCB_BEGIN(t);
    while (!llmcb_op_done(st->op)) {
        llmcb_run_text(llmcb_op_run(st->op), llmcb_text("other"));
        LLMCB_AWAIT(t, llmcb_await_run(t, llmcb_op_run(st->op)));
        LLMCB_AWAIT(t, llmcb_sleep(t, 1));
    }
    LLMCB_END(t);
}

/* Actions that do not fit into the agent's window wait for its handlers. */
TEST(huge_arguments)
{
    static const mode modes[] = { INLINE, ASYNC, SYNC };
    size_t size = 300000 / STRIDE;
    char *one = (char *)malloc(size + 1);
    char *pieces = (char *)malloc(9 * (size + 400));
    int k, i;

    if (!one || !pieces) abort();
    memset(one, 'x', size);
    one[size] = '\0';
    pieces[0] = '\0';
    for (i = 0; i < 8; i++)
        sprintf(pieces + strlen(pieces),
                TC("%d", "k%d", "echo", "{\\\"t\\\":\\\"%s\\\"}") "|", i, i,
                one);
    strcat(pieces, &TCEND[1]);
    for (k = 0; k < 3; k++) {
        stage st;
        llmcb_op *other;

        stage_init(&st, modes[k]);
        if (k == 1) st.w->ms = 1;
        says(&st, pieces);
        says(&st, SAYS("ok"));
        CHECK(stage_open(&st));
        st.op = ask(&st);
        other = llmcb_task_start(st.s.loop, awaits_run, 0, &st);
        CHECK_INT(llmcb_op_wait(st.op), LLMCB_OK);
        llmcb_op_wait(other);
        llmcb_op_free(other);
        CHECK_INT(st.w->count[LLMCB_AGENT_ACTION], 8);
        CHECK_INT(st.w->count[LLMCB_TOOL_END], 8);
        CHECK(strlen(body(&st, 1)) > 16 * size);
        finish(&st);
    }
    free(one);
    free(pieces);
}

TEST(actions_are_told_before_the_tools_whoever_waits)
{
    stage st;
    llmcb_op *other;

    stage_init(&st, ASYNC);
    st.w->ms = 5;
    says(&st, TC("0", "x", "echo", "{}") TCEND);
    says(&st, SAYS("ok"));
    CHECK(stage_open(&st));
    st.op = ask(&st);
    other = llmcb_task_start(st.s.loop, awaits_run, 0, &st);
    CHECK_INT(llmcb_op_wait(st.op), LLMCB_OK);
    CHECK(run_named(st.w, "echo", 0)->from >=
          run_named(st.w, "RunnableSequence", 0)->to + 5 + 5);
    llmcb_op_wait(other);
    llmcb_op_free(other);
    finish(&st);
}

/* ---- handlers that interfere --------------------------------------------- */

static int interferes(wit *w, const llmcb_event *ev)
{
    if (ev->kind != w->at || w->acted++) return 0;
    switch (w->result) {
    case 1: llmcb_op_cancel(*w->op); return 0;
    case 2:
        llmcb_op_free(*w->op);
        *w->op = NULL;
        return 0;
    case 3: return llmcb_loop_free(on_stage->s.loop) != LLMCB_ESTATE;
    case 4: return -9;
    case 5: /* ends a run that is the library's */
        llmcb_run_end(ev->run, llmcb_text("ended"));
        return 0;
    default: llmcb_run_fail(ev->run, NULL); return 0;
    }
}

/* At each kind of event: cancel, free, fail with RAISE, end or fail the run
 * under the agent's feet. */
TEST(handlers_interfere_at_every_event)
{
    static const mode modes[] = { INLINE, ASYNC, SYNC };
    static const llmcb_event_kind at[] = {
        LLMCB_CHAIN_START, LLMCB_TEXT, LLMCB_CHAT_MODEL_START,
        LLMCB_LLM_NEW_TOKEN, LLMCB_LLM_END, LLMCB_LLM_ERROR,
        LLMCB_CHAIN_END, LLMCB_CHAIN_ERROR, LLMCB_AGENT_ACTION,
        LLMCB_TOOL_START, LLMCB_TOOL_END, LLMCB_TOOL_ERROR,
        LLMCB_AGENT_FINISH, LLMCB_CUSTOM_EVENT
    };
    size_t i;
    int k, what, again, bad;

    for (i = 0; i < sizeof at / sizeof *at; i++)
        for (k = 0; k < 3; k++)
            for (what = 1; what <= 6; what++)
                for (again = 0; again < 3; again++)
                    for (bad = 0; bad < 3; bad++) {
                        stage st;
                        wit *w;

                        /* freeing is the loop thread's */
                        if (k == 2 && (what == 2 || what >= 5)) continue;
                        stage_init(&st, modes[k]);
                        w = st.w;
                        if (what == 4) w->h.flags |= LLMCB_RAISE;
                        w->act = interferes;
                        w->at = at[i];
                        w->result = what;
                        w->acted = 0u - (unsigned)again;
                        says(&st, TC("0", "x", "slow", "{\\\"ms\\\":9}") "|"
                                  TC("1", "y", "add", "{}") "|"
                                  TC("2", "z", "echo", "{}") TCEND);
                        if (bad == 1)
                            scene_tape(&st.s, "HTTP/1.1 400 X\r\n"
                                              "Content-Length: 0\r\n\r\n",
                                       "", 0, LLMCB_REPLAY_KEEP);
                        else
                            says(&st, SAYS("ok"));
                        st.tools[0].handle_errors = bad != 2;
                        CHECK(stage_open(&st));
                        st.op = ask(&st);
                        llmcb_loop_run(st.s.loop);
                        if (st.op) CHECK(llmcb_op_done(st.op));
                        if (what == 4 && w->acted > (unsigned)again &&
                            w->acted < 100)
                            CHECK(llmcb_op_code(st.op) != LLMCB_OK);
                        if (st.op) read_op(st.op);
                        finish(&st);
                    }
}

/* A raised failure of a tool's handler is no failure of the tool. */
TEST(raised_failures_are_not_told_to_the_model)
{
    static const llmcb_event_kind at[] = { LLMCB_TOOL_START, LLMCB_TOOL_END };
    stage st;
    size_t i;

    for (i = 0; i < 2; i++) {
        stage_init(&st, INLINE);
        st.w->h.flags |= LLMCB_RAISE;
        st.w->act = interferes;
        st.w->at = at[i];
        st.w->result = 4;
        st.tools[0].handle_errors = true;
        says(&st, ONE_TOOL);
        CHECK_INT(perform(&st), LLMCB_EHANDLER);
        CHECK_INT(llmcb_op_error(st.op)->handler_result, -9);
        CHECK_INT(st.n_bodies, 1);
        finish(&st);
    }
}

/* Nor is a handler that was too slow, in our tools or in the one for names
 * that are none. */
TEST(slow_handlers_are_not_told_to_the_model)
{
    int k;

    for (k = 0; k < 2; k++) {
        stage st;
        wit *slow = wit_new(ASYNC);

        stage_init(&st, INLINE);
        slow->ms = 500;
        memset(&slow->h.async, 0, sizeof slow->h.async);
        slow->h.async.on_tool_start = wit_async;
        st.callbacks[1] = &slow->h;
        st.config.n_callbacks = 2;
        st.ad.handler_ms = 20;
        st.tools[0].handle_errors = true;
        if (k) {
            says(&st, TC("0", "x", "none", "{}") TCEND);
        } else {
            says(&st, ONE_TOOL);
        }
        says(&st, SAYS("ok"));
        CHECK_INT(perform(&st), LLMCB_ETIMEDOUT);
        CHECK_INT(llmcb_op_error(st.op)->detail, LLMCB_DETAIL_HANDLER);
        CHECK_INT(st.n_bodies, 1);
        finish(&st);
        free(slow);
    }
}

/* Nor does its time stand still while the agent waits until all have been told
 * what it is about to do. */
TEST(handler_ms_while_actions_are_told)
{
    int sync;

    for (sync = 0; sync < 2; sync++) {
        stage st;
        wit *slow = wit_new(sync ? SYNC : ASYNC);

        stage_init(&st, INLINE);
        slow->ms = 5000;
        slow->gate = &st.gate;
        slow->at = LLMCB_AGENT_ACTION;
        memset(&slow->h.sync, 0, sizeof slow->h.sync);
        memset(&slow->h.async, 0, sizeof slow->h.async);
        if (sync)
            slow->h.sync.on_agent_action = wit_sync;
        else
            slow->h.async.on_agent_action = wit_async;
        st.callbacks[1] = &slow->h;
        st.config.n_callbacks = 2;
        st.ad.handler_ms = 20;
        says(&st, ONE_TOOL);
        says(&st, SAYS("ok"));
        CHECK(stage_open(&st));
        st.op = ask(&st);
        if (sync) { /* no clock passes a worker by itself */
            turn_to_gate(&st.s, &st.gate, 1);
            llmcb_clock_advance(st.s.loop, 20);
            turns(&st.s, 20);
            CHECK(llmcb_op_done(st.op));
        }
        if (!llmcb_op_done(st.op)) gate_let(&st.gate, ALL);
        CHECK_INT(llmcb_op_wait(st.op), LLMCB_ETIMEDOUT);
        CHECK_INT(llmcb_op_error(st.op)->detail, LLMCB_DETAIL_HANDLER);
        CHECK_INT(llmcb_loop_now(st.s.loop), 20);
        CHECK_INT(st.n_bodies, 1);
        gate_let(&st.gate, ALL);
        finish(&st);
        free(slow);
    }
}

static int fails_at_the_end(wit *w, const llmcb_event *ev)
{
    (void)w;
    return ev->kind == LLMCB_CHAIN_END && !*ev->run->parent_id ? 77 : 0;
}

/* A raised failure of the last event does not hide why the agent had ended. */
TEST(raised_when_the_end_at_a_limit_is_told)
{
    stage st;

    stage_init(&st, INLINE);
    st.ad.max_turns = 1;
    st.w->h.flags |= LLMCB_RAISE;
    st.w->act = fails_at_the_end;
    says(&st, ONE_TOOL);
    CHECK_INT(perform(&st), LLMCB_ELIMIT);
    CHECK_INT(llmcb_op_error(st.op)->code, LLMCB_ELIMIT);
    CHECK_INT(llmcb_op_error(st.op)->handler_result, 77);
    CHECK_INT(st.w->count[LLMCB_CHAIN_END], 2); /* the model's, the agent's */
    finish(&st);
}

/* ---- the end at every moment --------------------------------------------- */

#define MIXED                                                           \
    TC("0", "c0", "slow", "{\\\"ms\\\":3}") "|" TC("1", "c1", "add", A12) \
    "|" TC("2", "c2", "echo", "{}") "|" TC("3", "c3", "none", "{}") TCEND

/* 0: cancel, 1: free, 2: free the loop, each after n turns. */
TEST(cut_short_after_every_turn)
{
    static const mode modes[] = { INLINE, ASYNC, SYNC };
    int k, how, n, asks;

    for (k = 0; k < 3; k++)
        for (how = 0; how < 3; how++)
            for (asks = 0; asks < 2; asks++)
                for (n = 0; n < (k == 2 ? 40 : 70); n++) {
                    stage st;
                    asking a;

                    memset(&a, 0, sizeof a);
                    a.ms = 1;
                    stage_init(&st, modes[k]);
                    if (asks) {
                        st.ad.approve = approve;
                        st.ad.user = &a;
                    }
                    st.tools[3].step = NULL;
                    st.tools[3].call = echo_call;
                    says(&st, MIXED);
                    says(&st, SAYS("ok"));
                    CHECK(stage_open(&st));
                    st.op = ask(&st);
                    turns(&st.s, n);
                    if (how == 0) {
                        bool done = llmcb_op_done(st.op);
                        llmcb_op_cancel(st.op);
                        llmcb_op_wait(st.op);
                        if (!done &&
                            llmcb_op_code(st.op) != LLMCB_ECANCELLED)
                            CHECK(st.w->count[LLMCB_AGENT_FINISH]);
                        read_op(st.op);
                        llmcb_op_free(st.op);
                    } else if (how == 1) {
                        llmcb_op_free(st.op);
                        turns(&st.s, n % 3);
                    }
                    st.op = NULL;
                    stage_close(&st);
                }
}

/* ---- memory -------------------------------------------------------------- */

/* The i-th allocation fails, once or from then on: an error that says so, or
 * all is well; nothing leaks, nothing is left without its end. */
TEST(no_memory_at_every_allocation)
{
    int k, for_ever, streaming;
    long i, most = 0;
    unsigned ok = 0, nomem = 0;

    for (k = 0; k < 2; k++)
        for (streaming = 0; streaming < 2; streaming++)
            for (for_ever = 0; for_ever < 2; for_ever++)
                for (i = 1; i < 2000; i += STRIDE) {
                    stage st;
                    llmcb_code code;
                    asking a;
                    bool reached;

                    memset(&a, 0, sizeof a);
                    stage_init(&st, k ? SYNC : INLINE);
                    st.s.heap.fail_at = i;
                    st.s.heap.for_ever = for_ever;
                    st.s.cd.streaming = streaming;
                    st.ad.approve = k ? approve : NULL;
                    st.ad.user = &a;
                    st.tools[0].handle_errors = true;
                    st.tools[3].step = NULL;
                    st.tools[3].call = echo_call;
                    says(&st, "Hm|" MIXED);
                    says(&st, TC("0", "x", "add", "{}") TCEND);
                    says(&st, SAYS("ok"));
                    if (stage_open(&st)) {
                        st.op = ask(&st);
                        code = llmcb_op_wait(st.op);
                        reached = heap_mend(&st.s.heap, i);
                        if (code == LLMCB_OK) ok++;
                        if (code == LLMCB_ENOMEM) nomem++;
                        /* a transport may not begin, a tool may not fail
                         * with words: no other code but those two */
                        if (code != LLMCB_OK && code != LLMCB_ENOMEM &&
                            code != LLMCB_ETOOL)
                            TEST_FAIL("allocation %ld: %s, %s", i,
                                      llmcb_code_name(code),
                                      llmcb_op_error(st.op)->message);
                        if (!reached) CHECK_INT(code, LLMCB_OK);
                        read_op(st.op);
                    } else {
                        st.s.heap.fail_at = 0;
                        reached = true;
                    }
                    finish(&st);
                    if (!reached) {
                        if (i > most) most = i;
                        break;
                    }
                }
    CHECK(most > 100 && most < 2000);
    CHECK(ok > 0 && nomem > 100 / STRIDE);
}

static char texts[8192]; /* of all runs, in order */

static int keeps_texts(wit *w, const llmcb_event *ev)
{
    size_t n = strlen(texts);

    (void)w;
    if (ev->kind == LLMCB_TEXT)
        snprintf(texts + n, sizeof texts - n, "[%s]", ev->data->text.ptr);
    return 0;
}

/* What an agent tells of a turn is told whole, or the agent has failed. */
TEST(no_memory_for_a_text_of_an_agent)
{
    static char whole[sizeof texts], longer[400];
    llmcb_message m[3];
    int for_ever;
    long i, most = 0;

    memset(longer, 'a', sizeof longer - 1);
    memset(m, 0, sizeof m);
    m[0].role = LLMCB_SYSTEM;
    m[0].content = "be kind, and let this be a line of some length";
    m[1].content = longer;
    m[2].content = "second";
    for (for_ever = 0; for_ever < 2; for_ever++)
        for (i = 0; i < 2000; i++) {
            stage st;
            llmcb_code code;
            bool reached;

            stage_init(&st, INLINE);
            st.w->act = keeps_texts;
            says(&st, ONE_TOOL);
            says(&st, SAYS("ok"));
            CHECK(stage_open(&st));
            *texts = '\0';
            st.s.heap.calls = 0;
            st.s.heap.fail_at = i; /* 0: none, to see what there is to tell */
            st.s.heap.for_ever = for_ever;
            st.op = llmcb_agent_start(&st.ad, m, 3, &st.config);
            code = llmcb_op_wait(st.op);
            reached = heap_mend(&st.s.heap, i);
            if (i == 0) strcpy(whole, texts);
            if (code != LLMCB_OK && code != LLMCB_ENOMEM)
                TEST_FAIL("allocation %ld: %s", i, llmcb_code_name(code));
            if (code == LLMCB_OK && strcmp(texts, whole) != 0)
                TEST_FAIL("allocation %ld: told %d of %d bytes", i,
                          (int)strlen(texts), (int)strlen(whole));
            finish(&st);
            if (!reached) break;
            most = i;
        }
    CHECK_INT(count_of(whole, "second"), 2);
    CHECK(most > 30 && most < 1999);
}

/* A tool that does not look whether its answer found room. */
static llmcb_step careless_step(llmcb_task *t, llmcb_tool_use *use)
{
    heap *h = &on_stage->s.heap;

    (void)t;
    h->fail_at = h->calls + 1;
    llmcb_tool_answer(use, llmcb_text("lost"));
    h->fail_at = 0;
    llmcb_tool_answer(use, llmcb_text(""));
    return 0;
}

TEST(no_memory_for_an_answer)
{
    llmcb_tool tool = echo_tool;
    stage st;

    stage_init(&st, INLINE);
    tool.step = careless_step;
    says(&st, "x" DONE);
    CHECK(stage_open(&st));
    st.op = use(&st, &tool, "{}");
    CHECK_INT(llmcb_op_wait(st.op), LLMCB_ENOMEM);
    CHECK_INT(st.w->count[LLMCB_TOOL_ERROR], 1);
    finish(&st);
}

/* ---- any agent ----------------------------------------------------------- */

static uint64_t dice_state;

static unsigned dice(unsigned n)
{
    dice_state = dice_state * 6364136223846793005u + 1442695040888963407u;
    return (unsigned)(dice_state >> 33) % n;
}

static void random_agent(unsigned seed)
{
    static const char *const names[] = { "add", "slow", "echo", "fail",
                                         "none", "block" };
    failure f = { LLMCB_ETOOL, "dice", true };
    asking a;
    wit *second = wit_new((mode)(seed % 3));
    stage st;
    unsigned i, k, n_turns, cut;
    bool freed = false;

    dice_state = seed;
    memset(&a, 0, sizeof a);
    stage_init(&st, (mode)dice(3));
    st.w->ms = dice(3) ? 0 : dice(5);
    second->ms = dice(3);
    st.callbacks[1] = &second->h;
    st.config.n_callbacks = 1 + dice(2);
    if (dice(3) == 0) st.w->h.flags |= LLMCB_AWAIT_EACH;
    if (dice(3) == 0) {
        st.w->act = interferes;
        st.w->at = (llmcb_event_kind)dice(LLMCB_N_EVENTS);
        /* from a worker the op could be freed meanwhile */
        st.w->result = dice(2) && (st.w->h.flags & LLMCB_INLINE) ? 1 : 4;
        st.w->h.flags |= LLMCB_RAISE;
    }
    st.tools[2] = echo_tool;
    st.tools[3] = echo_tool;
    st.tools[3].name = "fail";
    st.tools[3].user = &f;
    st.tools[3].step = dice(2) ? fail_step : NULL;
    st.tools[3].call = st.tools[3].step ? NULL : fail_call;
    st.tools[4] = echo_tool;
    st.tools[4].name = "block";
    st.tools[4].step = NULL;
    st.tools[4].call = echo_call;
    st.ad.n_tools = 5;
    for (i = 0; i < 5; i++) {
        st.tools[i].handle_errors = dice(4) != 0;
        st.tools[i].timeout_ms = dice(4) ? 0 : 1 + dice(12);
    }
    if (dice(2)) {
        st.ad.approve = approve;
        st.ad.user = &a;
        a.ms = dice(4);
        a.result = dice(4) ? LLMCB_DONE : LLMCB_ETOOL;
        st.ad.approve_frame = a.frame = dice(3) * 40;
    }
    st.ad.total_ms = dice(3) ? 0 : 1 + dice(40);
    st.ad.max_turns = (int)dice(6);
    st.ad.handler_ms = dice(4) ? 0 : 1 + dice(6);
    st.s.cd.limits.window_events = dice(2) ? 0 : 1 + dice(4);
    st.s.ld.workers = 2 + dice(3);
    n_turns = dice(5);
    for (i = 0; i < n_turns; i++) {
        char pieces[6000] = "";
        unsigned n = 1 + dice(6);
        for (k = 0; k < n; k++)
            sprintf(pieces + strlen(pieces),
                    TC("%u", "i%u", "%s", "{\\\"ms\\\":%u%s") "|", k, k,
                    names[dice(6)], dice(20), dice(8) ? "}" : "");
        strcat(pieces, dice(9) ? &TCEND[1] : "{\"error\":{}}");
        scene_tape(&st.s, OK_HEAD, pieces, dice(3), LLMCB_REPLAY_KEEP);
    }
    says(&st, SAYS("fin"));
    if (!stage_open(&st)) abort();
    st.op = ask(&st);
    cut = dice(3) ? 0 : 1 + dice(60);
    for (i = 0; (!cut || i < cut) && !llmcb_op_done(st.op); i++)
        llmcb_loop_run_once(st.s.loop, -1);
    if (cut && dice(3) == 0) {
        llmcb_op_free(st.op);
        st.op = NULL;
        freed = true;
    } else if (cut && dice(2)) {
        llmcb_op_cancel(st.op);
        llmcb_op_wait(st.op);
    } else if (!cut) {
        llmcb_op_wait(st.op);
        if (llmcb_op_code(st.op) == LLMCB_OK)
            CHECK(!strcmp(llmcb_op_output(st.op)->text.ptr, "fin") ||
                  !strcmp(llmcb_op_output(st.op)->text.ptr, ""));
    }
    if (!freed) read_op(st.op);
    /* sometimes the op goes with the loop */
    if (dice(2)) llmcb_op_free(st.op);
    st.op = NULL;
    /* who is given up is told no more */
    st.w->given_up = second->given_up = st.ad.handler_ms > 0;
    stage_close(&st);
    CHECK_WIT(second);
    free(second);
}

TEST(random_agents)
{
    const char *from = getenv("TEST_SEED"), *many = getenv("TEST_SEEDS");
    unsigned seed = from ? (unsigned)atoi(from) : 1;
    unsigned last = seed + (many ? (unsigned)atoi(many) : from ? 1 : 400);

    for (; seed < last; seed++) {
        int before_it = test_failures_here;
        random_agent(seed);
        if (test_failures_here > before_it) {
            TEST_FAIL("TEST_SEED=%u", seed);
            break;
        }
    }
}

int main(int argc, char **argv)
{
    return scene_main(argc, argv);
}

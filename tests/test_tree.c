/* Runs of the program's own: their tree, their events and their end. The
 * cases are rows of LangChain's rules as llmcb keeps or changes them; then
 * come cancels at every moment, forgotten runs, no memory, misuse, and trees
 * that only a seed decides. Tools and agents have tests of their own. */
#include "scene.h"
#include <sched.h>
#include <sys/wait.h>

/* ---- the world: a scene, and what every handler saw of every run --------- */

#define MAX_EARS 8

/* What became of one run, over all ears. */
typedef struct tale {
    char id[37], parent[37];
    struct {
        uint64_t seq;
        bool inside, finished;
    } of[MAX_EARS];
    unsigned telling; /* ears inside its start */
    unsigned open;    /* ears with a start that are not done with its finish */
    bool finishing;   /* an ear has been given the finish */
    bool parental;    /* a child has been told of */
    bool failed;
    llmcb_code code;
    llmcb_detail detail;
} tale;

struct world;

/* A handler of all events. Its log has +name, -name and !name:CODE for starts,
 * ends and errors, and a word for everything else. */
typedef struct ear {
    llmcb_handler h; /* first */
    struct world *w;
    const char *name;
    size_t place;
    int64_t ms; /* what an async event takes */
    int (*act)(struct ear *e, const llmcb_event *ev);
    void *user;
    gate *gate;
    int gate_kind; /* or -1: all */
    char log[16384];
    size_t len;
    unsigned told[LLMCB_N_EVENTS], events, inside, peak, here;
    uint64_t skipped;
} ear;

typedef struct world {
    scene s; /* first */
    pthread_mutex_t m;
    ear *ears[MAX_EARS];
    llmcb_handler *list[MAX_EARS];
    size_t n_ears;
    tale *tales;
    size_t n_tales, cap;
    const char *wrong; /* a guarantee that was broken */
    bool partial;      /* some do not hear everything */
    bool impatient;    /* handlers may be given up */
    pthread_t loop_thread;
} world;

static llmcb_str str(const char *s)
{
    llmcb_str r;

    r.ptr = s;
    r.len = strlen(s);
    return r;
}

static bool starts(llmcb_event_kind k)
{
    return is_start(k) || k == LLMCB_CHAIN_START || k == LLMCB_TOOL_START ||
           k == LLMCB_RETRIEVER_START;
}

static bool fails(llmcb_event_kind k)
{
    return k == LLMCB_LLM_ERROR || k == LLMCB_CHAIN_ERROR ||
           k == LLMCB_TOOL_ERROR || k == LLMCB_RETRIEVER_ERROR;
}

static bool ends(llmcb_event_kind k)
{
    return k == LLMCB_LLM_END || k == LLMCB_CHAIN_END ||
           k == LLMCB_TOOL_END || k == LLMCB_RETRIEVER_END;
}

/* Under the lock. */
static tale *tale_of(world *w, const char *id)
{
    size_t i;

    for (i = w->n_tales; i--;)
        if (strcmp(w->tales[i].id, id) == 0) return &w->tales[i];
    return NULL;
}

static tale *tale_new(world *w, const llmcb_run *run)
{
    tale *t;

    if (w->n_tales == w->cap) {
        w->cap = w->cap ? 2 * w->cap : 64;
        w->tales = (tale *)realloc(w->tales, w->cap * sizeof *w->tales);
        if (!w->tales) abort();
    }
    t = &w->tales[w->n_tales++];
    memset(t, 0, sizeof *t);
    strcpy(t->id, run->id);
    strcpy(t->parent, run->parent_id);
    return t;
}

/* Everything a payload points to is read. */
static size_t read_str(llmcb_str s)
{
    size_t i, n = 0;

    for (i = 0; i <= s.len; i++) n += (unsigned char)s.ptr[i];
    return n;
}

static void word_of(char *out, size_t cap, const llmcb_event *ev)
{
    const char *name = ev->run->name;
    size_t i, k;

    switch (ev->kind) {
    case LLMCB_LLM_NEW_TOKEN:
        snprintf(out, cap, "'%s'", ev->token->text.ptr);
        break;
    case LLMCB_AGENT_ACTION:
        read_str(ev->action->log);
        read_str(ev->action->tool_call_id);
        snprintf(out, cap, "%s.action:%s(%s)", name, ev->action->tool.ptr,
                 ev->action->input.ptr);
        break;
    case LLMCB_AGENT_FINISH:
        snprintf(out, cap, "%s.finish:%s/%s", name, ev->output->text.ptr,
                 ev->output->log.ptr);
        break;
    case LLMCB_TEXT:
        snprintf(out, cap, "%s.text:%s", name, ev->data->text.ptr);
        break;
    case LLMCB_RETRY:
        snprintf(out, cap, "%s.retry:%d", name, ev->retry->attempt);
        break;
    case LLMCB_CUSTOM_EVENT:
        snprintf(out, cap, "%s.%s=%s", name, ev->data->name.ptr,
                 ev->data->text.ptr);
        break;
    default:
        if (starts(ev->kind)) {
            read_str(ev->start->input);
            read_str(ev->start->prompt);
            snprintf(out, cap, "+%s", name);
        } else if (fails(ev->kind)) {
            snprintf(out, cap, "!%s:%s", name,
                     llmcb_code_name(ev->error->code) + 6);
        } else {
            if (ev->output) read_str(ev->output->text);
            for (i = 0; ev->output && i < ev->output->n_documents; i++) {
                const llmcb_document *d = &ev->output->documents[i];
                read_str(d->content);
                read_str(d->id);
                for (k = 0; k < d->n_metadata; k++)
                    read_str(str(d->metadata[k].value));
            }
            snprintf(out, cap, "-%s", name);
        }
    }
}

static const char *payload_check(const llmcb_event *ev)
{
    llmcb_event_kind k = ev->kind;
    bool own = ends(k) && k != LLMCB_LLM_END;

    if (starts(k) != (ev->seq == 1)) return "a start in between";
    if (!ev->start == starts(k)) return "start payload";
    if (!ev->token == (k == LLMCB_LLM_NEW_TOKEN)) return "token payload";
    if (!ev->error == fails(k)) return "error payload";
    if (!ev->result == is_finish(k)) return "result payload";
    if (!ev->retry == (k == LLMCB_RETRY)) return "retry payload";
    if (!ev->action == (k == LLMCB_AGENT_ACTION)) return "action payload";
    if (!ev->output == (own || k == LLMCB_AGENT_FINISH))
        return "output payload";
    if (!ev->data == (k == LLMCB_TEXT || k == LLMCB_CUSTOM_EVENT))
        return "data payload";
    if (ev->skipped && !fails(k)) return "skipped without an error";
    return NULL;
}

/* The guarantees of a run, and of a tree. */
static const char *tale_check(world *w, ear *e, tale *t, const llmcb_event *ev)
{
    tale *parent;
    size_t i;

    if (t->of[e->place].inside) return "two events of a run at once";
    if (t->of[e->place].finished) return "an event after the finish";
    if (ev->seq <= t->of[e->place].seq) return "out of order";
    if (!w->partial && !t->of[e->place].seq != starts(ev->kind))
        return "an event without a start";
    if (w->impatient) return NULL;
    if (starts(ev->kind)) {
        if (t->parental) return "a start behind that of a child";
        if (t->finishing) return "a start behind a finish";
        parent = tale_of(w, t->parent);
        if (!parent) return NULL;
        parent->parental = true;
        if (parent->telling) return "a start beside that of its parent";
        if (parent->finishing) return "a start behind its parent's finish";
    }
    if (ends(ev->kind) || fails(ev->kind)) {
        for (i = 0; i < w->n_tales; i++)
            if (strcmp(w->tales[i].parent, t->id) == 0 && w->tales[i].open)
                return "a finish before that of a child";
        if (t->finishing &&
            (t->failed != fails(ev->kind) ||
             (ev->error && (t->code != ev->error->code ||
                            t->detail != ev->error->detail))))
            return "two different finishes";
    }
    return NULL;
}

static void ear_enter(ear *e, const llmcb_event *ev)
{
    world *w = e->w;
    const char *wrong = payload_check(ev), *more;
    char word[256];
    tale *t;

    word_of(word, sizeof word, ev);
    pthread_mutex_lock(&w->m);
    t = tale_of(w, ev->run->id);
    if (!t) t = tale_new(w, ev->run);
    more = tale_check(w, e, t, ev);
    if (!wrong) wrong = more;
    if (wrong && !w->wrong) {
        w->wrong = wrong;
        printf("  %s in %s: %s\n", wrong, e->name, word);
    }
    t->of[e->place].inside = true;
    t->of[e->place].seq = ev->seq;
    if (starts(ev->kind)) {
        t->telling++;
        t->open++;
    }
    if (ends(ev->kind) || fails(ev->kind)) {
        t->of[e->place].finished = t->finishing = true;
        t->failed = fails(ev->kind);
        t->code = ev->error ? ev->error->code : LLMCB_OK;
        t->detail = ev->error ? ev->error->detail : LLMCB_DETAIL_NONE;
    }
    e->told[ev->kind]++;
    e->events++;
    e->here += pthread_equal(pthread_self(), w->loop_thread) != 0;
    e->skipped += ev->skipped;
    if (++e->inside > e->peak) e->peak = e->inside;
    if (e->len < sizeof e->log - sizeof word)
        e->len += (size_t)sprintf(e->log + e->len, "%s%s",
                                  e->len ? " " : "", word);
    pthread_mutex_unlock(&w->m);
    note("%s<%s", e->name, word);
}

static int ear_leave(ear *e, const llmcb_event *ev)
{
    world *w = e->w;
    int result = e->act ? e->act(e, ev) : 0;
    char word[256];
    tale *t;

    word_of(word, sizeof word, ev); /* the payload is still there */
    note("%s>%s", e->name, word);
    pthread_mutex_lock(&w->m);
    t = tale_of(w, ev->run->id);
    if (starts(ev->kind)) t->telling--;
    if ((ends(ev->kind) || fails(ev->kind)) && t->open) t->open--;
    t->of[e->place].inside = false;
    e->inside--;
    pthread_mutex_unlock(&w->m);
    return result;
}

static int ear_sync(llmcb_handler *h, const llmcb_event *ev)
{
    ear *e = (ear *)(void *)h;

    ear_enter(e, ev);
    if (e->gate && (e->gate_kind < 0 || e->gate_kind == (int)ev->kind))
        gate_pass(e->gate);
    return ear_leave(e, ev);
}

static llmcb_step ear_async(llmcb_task *t, llmcb_handler *h,
                            const llmcb_event *ev)
{
    ear *e = (ear *)(void *)h;

    LLMCB_BEGIN(t);
    ear_enter(e, ev);
    if (e->ms) LLMCB_AWAIT(t, llmcb_sleep(t, e->ms));
    return ear_leave(e, ev);
    LLMCB_END(t);
}

/* Nothing on its way to the scene but handlers that were made before. */
static void world_init(world *w)
{
    memset(w, 0, sizeof *w);
    pthread_mutex_init(&w->m, NULL);
    w->loop_thread = pthread_self();
    scene_init(&w->s);
}

/* The tables are lists of functions in the order of the kinds. */
static ear *world_ear(world *w, const char *name, mode m, unsigned flags)
{
    ear *e = (ear *)calloc(1, sizeof *e);
    llmcb_sync_fn *sync;
    llmcb_async_fn *async;
    int k;

    if (!e) abort();
    sync = (llmcb_sync_fn *)(void *)&e->h.sync;
    async = (llmcb_async_fn *)(void *)&e->h.async;
    for (k = 0; k < LLMCB_N_EVENTS; k++) {
        bool token = k == LLMCB_LLM_NEW_TOKEN || k == LLMCB_TEXT;
        bool other = m == ASYNC || m == SYNC_TOKENS || m == INLINE_TOKENS;
        if (token ? m == ASYNC || m == ASYNC_TOKENS : other)
            async[k] = ear_async;
        else
            sync[k] = ear_sync;
    }
    if (m == INLINE || m == INLINE_TOKENS) flags |= LLMCB_INLINE;
    e->h.flags = flags;
    e->h.name = e->name = name;
    e->w = w;
    e->gate_kind = -1;
    e->place = w->n_ears;
    w->list[w->n_ears] = &e->h;
    w->ears[w->n_ears++] = e;
    return e;
}

/* One of each kind. */
static void world_all_ears(world *w)
{
    world_ear(w, "S", SYNC, 0);
    world_ear(w, "A", ASYNC, 0);
    world_ear(w, "I", INLINE, 0);
    world_ear(w, "P", SYNC, LLMCB_PARALLEL);
    world_ear(w, "E", ASYNC, LLMCB_AWAIT_EACH);
    world_ear(w, "SE", SYNC_TOKENS, LLMCB_AWAIT_EACH);
}

/* Two answers of three tokens, 10 ms apart. */
static bool world_open(world *w)
{
    scene_tape(&w->s, OK_HEAD, "a|b|c" DONE, 10, LLMCB_REPLAY_KEEP);
    return scene_open(&w->s);
}

static llmcb_config world_config(world *w)
{
    llmcb_config c;

    memset(&c, 0, sizeof c);
    c.callbacks = w->list;
    c.n_callbacks = w->n_ears;
    return c;
}

static void world_close(world *w)
{
    size_t i, k;

    scene_close(&w->s);
    if (w->wrong) TEST_FAIL("%s", w->wrong);
    for (i = 0; i < w->n_tales; i++)
        for (k = 0; k < w->n_ears && !w->impatient && !w->partial; k++) {
            if (w->tales[i].of[k].inside)
                TEST_FAIL("%s is still inside", w->ears[k]->name);
            if (w->tales[i].of[k].seq && !w->tales[i].of[k].finished)
                TEST_FAIL("%s saw no finish: %s", w->ears[k]->name,
                          w->ears[k]->log);
        }
    for (i = 0; i < w->n_ears; i++) {
        const ear *e = w->ears[i];
        if (!(e->h.flags & LLMCB_PARALLEL) && e->h.sync.on_chain_start &&
            e->h.sync.on_text && e->peak > 1)
            TEST_FAIL("%s was entered twice", e->name);
        free(w->ears[i]);
    }
    free(w->tales);
    pthread_mutex_destroy(&w->m);
}

/* While workers may be at it. */
static unsigned heard(ear *e, llmcb_event_kind kind)
{
    unsigned n;

    pthread_mutex_lock(&e->w->m);
    n = e->told[kind];
    pthread_mutex_unlock(&e->w->m);
    return n;
}

static llmcb_op *run_new(world *w, llmcb_run_kind kind, const char *name,
                         const llmcb_config *c)
{
    llmcb_run_desc d;

    memset(&d, 0, sizeof d);
    d.kind = kind;
    d.name = name;
    d.input = str("in");
    return llmcb_run_start(w->s.loop, &d, c);
}

static llmcb_op *run_body(world *w, const char *name, llmcb_task_fn body,
                          size_t frame, void *self, const llmcb_config *c)
{
    llmcb_run_desc d;

    memset(&d, 0, sizeof d);
    d.name = name;
    d.body = body;
    d.frame_size = frame;
    d.self = self;
    return llmcb_run_start(w->s.loop, &d, c);
}

static llmcb_op *run_within(world *w, llmcb_op *parent, llmcb_run_kind kind,
                            const char *name)
{
    llmcb_config c = llmcb_run_child(llmcb_op_run(parent), NULL);

    return run_new(w, kind, name, &c);
}

static llmcb_op *chat_with(world *w, const llmcb_config *c)
{
    llmcb_message m;

    memset(&m, 0, sizeof m);
    m.content = "hi";
    return llmcb_chat_generate(w->s.chat, &m, 1, c);
}

static llmcb_op *chat_within(world *w, llmcb_run *parent, const char *step)
{
    llmcb_config c = llmcb_run_child(parent, step);

    return chat_with(w, &c);
}

/* Ends a run well and waits for that. */
static void end_and_free(llmcb_op *op, const char *output)
{
    CHECK_INT(llmcb_run_end(llmcb_op_run(op), str(output)), LLMCB_OK);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_STR(llmcb_op_output(op)->text.ptr, output);
    llmcb_op_free(op);
}

/* Tags and metadata of a run in one line: "a,b k=v". */
static const char *labels_of(const llmcb_run *run)
{
    static char out[512];
    size_t i, n = 0;

    out[0] = '\0';
    for (i = 0; i < run->n_tags; i++)
        n += (size_t)sprintf(out + n, "%s%s", i ? "," : "", run->tags[i]);
    for (i = 0; i < run->n_metadata; i++)
        n += (size_t)sprintf(out + n, " %s=%s", run->metadata[i].key,
                             run->metadata[i].value);
    return out;
}

/* ======== dispatch ======================================================== */

static int act_fail_in(ear *e, const llmcb_event *ev)
{
    return *(const int *)e->user == (int)ev->kind ? -7 : 0;
}

/* The text events "1" to "n" and a good end. */
static void speak_and_end(llmcb_op *op, int n)
{
    char word[16];
    int i;

    for (i = 1; i <= n; i++) {
        sprintf(word, "%d", i);
        CHECK_INT(llmcb_run_text(llmcb_op_run(op), str(word)), LLMCB_OK);
    }
    CHECK_INT(llmcb_run_end(llmcb_op_run(op), str("out")), LLMCB_OK);
}

/* C has no "not implemented" to raise: a function that is not there is not
 * called, flagged or not, and stops nobody. */
TEST(case_006_what_is_not_implemented_stops_nobody)
{
    world w;
    ear *none, *last;
    llmcb_config c;
    llmcb_op *op;

    world_init(&w);
    w.partial = true;
    none = world_ear(&w, "none", INLINE, LLMCB_RAISE | LLMCB_AWAIT_EACH);
    memset(&none->h.sync, 0, sizeof none->h.sync);
    none->h.sync.on_chain_start = ear_sync;
    last = world_ear(&w, "last", INLINE, LLMCB_AWAIT_EACH);
    world_open(&w);
    c = world_config(&w);
    op = run_new(&w, LLMCB_RUN_CHAIN, "r", &c);
    speak_and_end(op, 1);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_STR(none->log, "+r");
    CHECK_STR(last->log, "+r r.text:1 -r");
    llmcb_op_free(op);
    world_close(&w);
}

/* In lock step, inline: who comes behind a failure does not get the event. */
TEST(case_008_a_raising_handler_in_lock_step)
{
    int kinds[] = { LLMCB_CHAIN_START, LLMCB_TEXT, LLMCB_CHAIN_END };
    size_t i, k;

    for (i = 0; i < 3; i++) {
        world w;
        llmcb_config c;
        llmcb_op *op;

        world_init(&w);
        for (k = 0; k < 3; k++)
            world_ear(&w, k == 0 ? "A" : k == 1 ? "B" : "C", INLINE,
                      LLMCB_AWAIT_EACH);
        w.ears[1]->h.flags |= LLMCB_RAISE;
        w.ears[1]->act = act_fail_in;
        w.ears[1]->user = &kinds[i];
        world_open(&w);
        c = world_config(&w);
        op = run_new(&w, LLMCB_RUN_CHAIN, "r", &c);
        speak_and_end(op, 1);
        CHECK_INT(llmcb_op_wait(op), LLMCB_EHANDLER);
        CHECK_INT(llmcb_op_error(op)->handler_result, -7);
        CHECK_STR(w.ears[0]->log, i == 0   ? "+r !r:EHANDLER"
                                  : i == 1 ? "+r r.text:1 !r:EHANDLER"
                                           : "+r r.text:1 -r");
        CHECK_STR(w.ears[1]->log, w.ears[0]->log);
        CHECK_STR(w.ears[2]->log, i == 0   ? "" /* no start, no finish */
                                  : i == 1 ? "+r !r:EHANDLER"
                                           : "+r r.text:1 -r");
        llmcb_op_free(op);
        world_close(&w);
    }
}

/* The sibling of a failing handler completes, and before the error. */
TEST(case_009_a_failure_does_not_cut_siblings_short)
{
    int kinds[] = { LLMCB_CHAIN_START, LLMCB_TEXT, LLMCB_CHAIN_END };
    size_t i;

    for (i = 0; i < 3; i++) {
        world w;
        ear *a, *b;
        llmcb_config c;
        llmcb_op *op;

        world_init(&w);
        a = world_ear(&w, "A", ASYNC, LLMCB_RAISE);
        b = world_ear(&w, "B", ASYNC, 0);
        a->act = act_fail_in;
        a->user = &kinds[i];
        b->ms = 50;
        world_open(&w);
        c = world_config(&w);
        op = run_new(&w, LLMCB_RUN_CHAIN, "r", &c);
        speak_and_end(op, 1);
        CHECK_INT(llmcb_op_wait(op), LLMCB_EHANDLER);
        CHECK_STR(b->log, i == 2 ? "+r r.text:1 -r"
                                 : "+r r.text:1 !r:EHANDLER");
        CHECK(i == 2 || before("B>r.text:1", "A<!r"));
        CHECK_INT(llmcb_loop_now(w.s.loop), 150);
        llmcb_op_free(op);
        world_close(&w);
    }
}

/* An inline handler that works for 100 ms. */
static int act_100ms(ear *e, const llmcb_event *ev)
{
    (void)ev;
    llmcb_clock_advance(e->w->s.loop, 100);
    return 0;
}

TEST(case_014_inline_handlers_add_up)
{
    world w;
    llmcb_config c;
    llmcb_op *op;
    size_t i;

    world_init(&w);
    for (i = 0; i < 2; i++)
        world_ear(&w, i ? "I2" : "I1", INLINE, 0)->act = act_100ms;
    world_open(&w);
    c = world_config(&w);
    op = run_new(&w, LLMCB_RUN_CHAIN, "r", &c);
    speak_and_end(op, 0);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_INT(llmcb_loop_now(w.s.loop), 400);
    CHECK(before("I1>+r", "I2<+r") && before("I2>+r", "I1<-r"));
    llmcb_op_free(op);
    world_close(&w);
}

TEST(case_018_fifty_events_of_a_sync_handler)
{
    world w;
    char want[2048];
    llmcb_config c;
    llmcb_op *op;
    size_t n;
    int i;

    world_init(&w);
    world_ear(&w, "S", SYNC, 0);
    world_ear(&w, "P", SYNC, LLMCB_PARALLEL); /* within a run neither */
    world_open(&w);
    c = world_config(&w);
    op = run_new(&w, LLMCB_RUN_CHAIN, "r", &c);
    speak_and_end(op, 50);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    n = (size_t)sprintf(want, "+r");
    for (i = 1; i <= 50; i++) n += (size_t)sprintf(want + n, " r.text:%d", i);
    strcpy(want + n, " -r");
    for (i = 0; i < 2; i++) {
        CHECK_STR(w.ears[i]->log, want);
        CHECK_INT(w.ears[i]->peak, 1);
        CHECK_INT(w.ears[i]->here, 0);
    }
    llmcb_op_free(op);
    world_close(&w);
}

/* No loop is running, and the handler's failure reaches the caller. */
TEST(case_022_023_async_handlers_of_a_blocking_call)
{
    int kind, never = -1;

    for (kind = 0; kind < 2; kind++) {
        world w;
        ear *e;
        llmcb_config c;
        llmcb_op *op;
        int text = LLMCB_TEXT;

        world_init(&w);
        e = world_ear(&w, "A", ASYNC, LLMCB_RAISE);
        e->ms = 20;
        e->act = act_fail_in;
        e->user = kind ? &text : &never;
        world_open(&w);
        c = world_config(&w);
        op = run_new(&w, LLMCB_RUN_CHAIN, "r", &c);
        speak_and_end(op, 1);
        CHECK_INT(e->events, 0); /* a start never calls back */
        CHECK_INT(llmcb_op_wait(op), kind ? LLMCB_EHANDLER : LLMCB_OK);
        CHECK_STR(e->log, kind ? "+r r.text:1 !r:EHANDLER"
                               : "+r r.text:1 -r");
        CHECK_INT(e->inside, 0);
        llmcb_op_free(op);
        world_close(&w);
    }
}

TEST(case_025_no_handlers)
{
    world w;
    llmcb_op *op;
    long calls = 0;
    int i;

    world_init(&w);
    world_open(&w);
    op = run_new(&w, LLMCB_RUN_CHAIN, NULL, NULL);
    turns(&w.s, 2);
    CHECK_INT(strlen(llmcb_op_run(op)->id), 36);
    CHECK_STR(llmcb_op_run(op)->name, "chain");
    CHECK_STR(llmcb_op_run(op)->parent_id, "");
    for (i = 0; i < 3000; i++) {
        if (i == 1000) calls = w.s.heap.calls;
        CHECK_INT(llmcb_run_text(llmcb_op_run(op), str("t")), LLMCB_OK);
        if (i % 100 == 99) turns(&w.s, 1);
    }
    /* under ASan blocks are not used again */
    CHECK(w.s.heap.calls - calls <= (LLMCBI_SPARE ? 0 : 2000 / 10));
    end_and_free(op, "x");
    world_close(&w);
}

/* ======== configurations ================================================== */

static int act_note_labels(ear *e, const llmcb_event *ev)
{
    (void)e;
    pthread_mutex_lock(&e->w->m);
    if (starts(ev->kind))
        note("%s[%s]", ev->run->name, labels_of(ev->run));
    pthread_mutex_unlock(&e->w->m);
    return 0;
}

/* A body that makes one chat call. */
static llmcb_step one_call(llmcb_task *t)
{
    llmcb_op **op = (llmcb_op **)t->frame;

    LLMCB_BEGIN(t);
    *op = chat_within((world *)t->self, llmcb_task_run(t), NULL);
    LLMCB_AWAIT(t, llmcb_await(t, *op));
    if (t->result == LLMCB_OK)
        llmcb_run_end(llmcb_task_run(t),
                      llmcb_op_result(*op)->generations[0].text);
    else
        llmcb_run_fail(llmcb_task_run(t), llmcb_op_error(*op));
    llmcb_op_free(*op);
    LLMCB_END(t);
}

TEST(case_029_request_handlers_reach_inner_models)
{
    world w;
    ear *r, *m;
    llmcb_handler *request[1];
    llmcb_config c;
    llmcb_op *op;

    world_init(&w);
    r = world_ear(&w, "R", ASYNC, 0);
    m = world_ear(&w, "C", ASYNC, 0);
    scene_add(&w.s, (rec *)(void *)m); /* of the chat; only its handler is */
    world_open(&w);
    memset(&c, 0, sizeof c);
    request[0] = &r->h;
    c.callbacks = request;
    c.n_callbacks = 1;
    op = run_body(&w, "chain", one_call, sizeof(llmcb_op *), &w, &c);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_STR(llmcb_op_output(op)->text.ptr, "abc");
    CHECK_STR(r->log, "+chain +ChatOpenAI 'a' 'b' 'c' '' -ChatOpenAI -chain");
    CHECK_STR(m->log, "+ChatOpenAI 'a' 'b' 'c' '' -ChatOpenAI");
    llmcb_op_free(op);
    world_close(&w);
}

/* What the model's constructor repeats is inherited all the same; so is a
 * key that a local value covers. */
TEST(case_031_032_local_labels_take_nothing_from_children)
{
    world w;
    const char *tags[] = { "a", "dup" }, *own[] = { "c", "dup" };
    llmcb_pair meta[] = { { "k", "1" } }, mine[] = { { "k", "2" } };
    llmcb_config c;
    llmcb_op *op, *child;

    world_init(&w);
    world_ear(&w, "I", INLINE, 0)->act = act_note_labels;
    world_open(&w);
    c = world_config(&w);
    c.tags = tags;
    c.n_tags = 2;
    c.local_tags = own;
    c.n_local_tags = 2;
    c.metadata = meta;
    c.n_metadata = 1;
    c.local_metadata = mine;
    c.n_local_metadata = 1;
    op = run_new(&w, LLMCB_RUN_CHAIN, "p", &c);
    child = run_within(&w, op, LLMCB_RUN_CHAIN, "q");
    turns(&w.s, 3);
    CHECK(strstr(trace, "p[a,c,dup k=2]") != NULL);
    CHECK(strstr(trace, "q[a,dup k=1]") != NULL);
    end_and_free(child, "");
    end_and_free(op, "");
    world_close(&w);
}

TEST(case_033_a_step_is_a_tag_of_one_child)
{
    world w;
    const char *tags[] = { "t" };
    llmcb_config c;
    llmcb_op *op, *child, *grand;
    char step[] = "step";

    world_init(&w);
    world_ear(&w, "I", INLINE, 0)->act = act_note_labels;
    world_open(&w);
    c = world_config(&w);
    c.tags = tags;
    c.n_tags = 1;
    op = run_new(&w, LLMCB_RUN_CHAIN, "p", &c);
    c = llmcb_run_child(llmcb_op_run(op), step);
    child = run_new(&w, LLMCB_RUN_TOOL, "q", &c);
    strcpy(step, "?"); /* it was copied */
    grand = run_within(&w, child, LLMCB_RUN_RETRIEVER, "r");
    turns(&w.s, 4);
    CHECK(strstr(trace, "p[t]") != NULL);
    CHECK(strstr(trace, "q[t,step]") != NULL);
    CHECK(strstr(trace, "r[t]") != NULL);
    CHECK_STR(llmcb_op_run(grand)->parent_id, llmcb_op_run(child)->id);
    end_and_free(grand, "");
    end_and_free(child, "");
    end_and_free(op, "");
    world_close(&w);
}

/* There are no managers to remove from or to set: a configuration says all.
 * A handler in both lists is told once; in the local one alone it does not
 * reach children; in none it hears nothing. */
TEST(case_034_035_036_lists_of_handlers)
{
    world w;
    ear *h;
    int i;

    for (i = 0; i < 4; i++) {
        llmcb_config c;
        llmcb_op *op, *child;

        world_init(&w);
        h = world_ear(&w, "h", INLINE, 0);
        world_open(&w);
        c = world_config(&w);
        c.local_callbacks = w.list;
        c.n_local_callbacks = i & 1;
        c.n_callbacks = (size_t)i >> 1;
        op = run_new(&w, LLMCB_RUN_CHAIN, "p", &c);
        child = run_within(&w, op, LLMCB_RUN_CHAIN, "q");
        turns(&w.s, 3);
        end_and_free(child, "");
        end_and_free(op, "");
        CHECK_STR(h->log, i == 0   ? ""
                          : i == 1 ? "+p -p"
                                   : "+p +q -q -p");
        world_close(&w);
    }
}

/* Again in C: a list that comes later moves a tag to the end. */
TEST(case_037_a_tag_that_comes_again_moves_to_the_end)
{
    world w;
    const char *tags[] = { "a", "b" }, *again[] = { "a" };
    llmcb_config c;
    llmcb_op *op, *child;

    world_init(&w);
    world_ear(&w, "I", INLINE, 0)->act = act_note_labels;
    world_open(&w);
    c = world_config(&w);
    c.tags = tags;
    c.n_tags = 2;
    c.local_tags = again;
    c.n_local_tags = 1;
    op = run_new(&w, LLMCB_RUN_CHAIN, "p", &c);
    c = llmcb_run_child(llmcb_op_run(op), "a");
    child = run_new(&w, LLMCB_RUN_CHAIN, "q", &c);
    turns(&w.s, 3);
    CHECK(strstr(trace, "p[b,a]") != NULL);
    CHECK(strstr(trace, "q[b,a]") != NULL);
    end_and_free(child, "");
    end_and_free(op, "");
    world_close(&w);
}

/* The run has a copy of its configuration, the handlers are shared. */
TEST(case_038_a_configuration_is_copied)
{
    world w;
    char tag[] = "tag", key[] = "k", value[] = "v", id[37], name[] = "name";
    const char *tags[1];
    llmcb_handler *list[1];
    llmcb_pair meta[1];
    llmcb_config c, before_it;
    llmcb_op *op, *child;
    ear *e;

    world_init(&w);
    e = world_ear(&w, "I", INLINE, 0);
    e->act = act_note_labels;
    world_open(&w);
    memset(&c, 0, sizeof c);
    strcpy(id, "01234567-89ab-4cde-8f01-23456789abcd");
    list[0] = &e->h;
    tags[0] = tag;
    meta[0].key = key;
    meta[0].value = value;
    c.callbacks = list;
    c.tags = tags;
    c.metadata = meta;
    c.n_callbacks = c.n_tags = c.n_metadata = 1;
    c.run_id = id;
    c.run_name = name;
    before_it = c;
    op = run_new(&w, LLMCB_RUN_CHAIN, "p", &c);
    CHECK(memcmp(&c, &before_it, sizeof c) == 0);
    list[0] = NULL;
    tags[0] = NULL;
    strcpy(tag, "???");
    strcpy(key, "?");
    strcpy(value, "?");
    strcpy(name, "????");
    strcpy(id, "?");
    child = run_within(&w, op, LLMCB_RUN_CHAIN, "q");
    turns(&w.s, 3);
    CHECK(strstr(trace, "name[tag k=v]") != NULL);
    CHECK(strstr(trace, "q[tag k=v]") != NULL);
    CHECK_STR(llmcb_op_run(op)->id, "01234567-89ab-4cde-8f01-23456789abcd");
    CHECK(strcmp(llmcb_op_run(child)->id, llmcb_op_run(op)->id) != 0);
    CHECK_STR(e->log, "+name +q");
    end_and_free(child, "");
    end_and_free(op, "");
    world_close(&w);
}

/* Two configurations are merged by joining their lists; their order stays. */
TEST(case_039_merged_configurations)
{
    world w;
    const char *tags[] = { "t1", "t2", "t1" }, *own[] = { "l1", "l2" };
    llmcb_pair meta[] = { { "a", "1" }, { "b", "1" }, { "a", "2" } };
    llmcb_handler *ih[2], *h[2];
    llmcb_config c;
    llmcb_op *op, *child;

    world_init(&w);
    ih[0] = &world_ear(&w, "ih1", INLINE, 0)->h;
    ih[1] = &world_ear(&w, "ih2", INLINE, 0)->h;
    h[0] = &world_ear(&w, "l1", INLINE, 0)->h;
    h[1] = &world_ear(&w, "l2", INLINE, 0)->h;
    w.ears[1]->act = act_note_labels;
    world_open(&w);
    memset(&c, 0, sizeof c);
    c.callbacks = ih;
    c.local_callbacks = h;
    c.n_callbacks = c.n_local_callbacks = 2;
    c.tags = tags;
    c.local_tags = own;
    c.metadata = meta;
    c.n_tags = c.n_metadata = 3;
    c.n_local_tags = 2;
    op = run_new(&w, LLMCB_RUN_CHAIN, "p", &c);
    child = run_within(&w, op, LLMCB_RUN_CHAIN, "q");
    turns(&w.s, 3);
    CHECK(before("ih1<+p", "ih2<+p") && before("ih2<+p", "l1<+p"));
    CHECK(before("l1<+p", "l2<+p") && before("ih1<+q", "ih2<+q"));
    CHECK_STR(w.ears[2]->log, "+p");
    /* one list's own repetitions stay, as in LangChain */
    CHECK(strstr(trace, "p[t1,t2,t1,l1,l2 a=2 b=1]") != NULL);
    CHECK(strstr(trace, "q[t1,t2,t1 a=2 b=1]") != NULL);
    end_and_free(child, "");
    end_and_free(op, "");
    world_close(&w);
}

/* There is no verbose and no debug: a hook is what they would add. It is not
 * added to a run that has the handler already, and children have it once. */
TEST(case_040_041_042_a_hook_is_added_once)
{
    int i;

    for (i = 0; i < 3; i++) { /* as a hook; and in the list; and local */
        world w;
        ear *e;
        llmcb_config c, same;
        llmcb_op *op, *child;

        world_init(&w);
        e = world_ear(&w, "h", INLINE, 0);
        world_open(&w);
        CHECK_INT(llmcb_loop_hook(w.s.loop, &e->h), LLMCB_OK);
        CHECK_INT(llmcb_loop_hook(w.s.loop, &e->h), LLMCB_OK);
        CHECK_INT(w.s.loop->n_hooks, 1);
        c = world_config(&w);
        c.n_callbacks = i == 1;
        c.local_callbacks = w.list;
        c.n_local_callbacks = i == 2;
        same = c;
        op = run_new(&w, LLMCB_RUN_CHAIN, "p", &c);
        CHECK(memcmp(&c, &same, sizeof c) == 0);
        c = llmcb_run_child(llmcb_op_run(op), NULL);
        CHECK_INT(c.n_callbacks, i == 1); /* a hook is not inherited */
        child = run_new(&w, LLMCB_RUN_CHAIN, "q", &c);
        turns(&w.s, 3);
        llmcb_loop_unhook(w.s.loop, &e->h);
        llmcb_loop_unhook(w.s.loop, &e->h);
        end_and_free(child, ""); /* both began before that */
        end_and_free(op, "");
        CHECK_STR(e->log, "+p +q -q -p");
        op = run_new(&w, LLMCB_RUN_CHAIN, "r", NULL);
        end_and_free(op, "");
        CHECK_STR(e->log, "+p +q -q -p");
        world_close(&w);
    }
}

TEST(a_hook_that_goes_leaves_the_others_in_order)
{
    static const char *const names[] = { "h0", "h1", "h2", "h3" };
    int gone, i;

    for (gone = 0; gone < 4; gone++) {
        world w;
        llmcb_op *op;
        const char *last = NULL;
        char first[8], then[8];

        world_init(&w);
        for (i = 0; i < 4; i++) world_ear(&w, names[i], INLINE, 0);
        world_open(&w);
        for (i = 0; i < 4; i++) llmcb_loop_hook(w.s.loop, w.list[i]);
        llmcb_loop_unhook(w.s.loop, w.list[gone]);
        op = run_new(&w, LLMCB_RUN_CHAIN, "p", NULL);
        end_and_free(op, "");
        for (i = 0; i < 4; i++) {
            CHECK_STR(w.ears[i]->log, i == gone ? "" : "+p -p");
            if (i == gone) continue;
            snprintf(first, sizeof first, "%s<+p", last ? last : "");
            snprintf(then, sizeof then, "%s<+p", names[i]);
            CHECK(!last || before(first, then));
            last = names[i];
        }
        world_close(&w);
    }
}

TEST(hooks_come_last_and_in_order)
{
    world w;
    llmcb_config c;
    llmcb_op *op;
    llmcb_handler bad;
    int i;

    world_init(&w);
    world_ear(&w, "h1", INLINE, 0);
    world_ear(&w, "h2", INLINE, 0);
    world_ear(&w, "own", INLINE, 0);
    world_open(&w);
    memset(&bad, 0, sizeof bad);
    bad.sync.on_text = ear_sync;
    bad.async.on_text = ear_async;
    CHECK_INT(llmcb_loop_hook(w.s.loop, &bad), LLMCB_EINVAL);
    CHECK_INT(llmcb_loop_hook(w.s.loop, NULL), LLMCB_EINVAL);
    CHECK_INT(llmcb_loop_hook(NULL, &bad), LLMCB_ENOMEM);
    llmcb_loop_unhook(NULL, &bad);
    llmcb_loop_unhook(w.s.loop, NULL);
    for (i = 0; i < 2; i++) llmcb_loop_hook(w.s.loop, w.list[i]);
    memset(&c, 0, sizeof c);
    c.callbacks = &w.list[2];
    c.n_callbacks = 1;
    op = chat_with(&w, &c);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK(before("own<+Chat", "h1<+Chat") && before("h1<+Chat", "h2<+Chat"));
    llmcb_op_free(op);
    world_close(&w); /* what is hooked still keeps nothing */
}

TEST(case_043_a_thousand_scoped_hooks)
{
    world w;
    ear *count;
    llmcb_op *op;
    size_t bytes = 0;
    unsigned told;
    int i;

    world_init(&w);
    count = world_ear(&w, "count", INLINE, 0);
    world_open(&w);
    for (i = 0; i < 1000; i++) {
        llmcb_error e;
        llmcb_loop_hook(w.s.loop, &count->h);
        op = run_new(&w, LLMCB_RUN_CHAIN, "r", NULL);
        memset(&e, 0, sizeof e);
        e.code = LLMCB_EIO;
        if (i == 500) /* left by an error */
            llmcb_run_fail(llmcb_op_run(op), &e);
        else
            llmcb_run_end(llmcb_op_run(op), str(""));
        CHECK_INT(llmcb_op_wait(op), i == 500 ? LLMCB_EIO : LLMCB_OK);
        llmcb_op_free(op);
        llmcb_loop_unhook(w.s.loop, &count->h);
        if (i == 0) bytes = w.s.heap.bytes;
    }
    CHECK_INT(w.s.heap.bytes, bytes);
    CHECK_INT(w.s.loop->n_hooks, 0);
    CHECK(w.s.loop->hooks_cap <= 4);
    told = count->events;
    CHECK_INT(told, 2000);
    op = run_new(&w, LLMCB_RUN_CHAIN, "r", NULL);
    end_and_free(op, "");
    CHECK_INT(count->events, told);
    world_close(&w);
}

static llmcb_op *batch_of(world *w, size_t n)
{
    llmcb_prompt prompts[4];
    llmcb_message m;
    llmcb_config c = world_config(w);
    size_t i;

    memset(&m, 0, sizeof m);
    m.content = "hi";
    for (i = 0; i < n; i++) {
        prompts[i].messages = &m;
        prompts[i].n = 1;
    }
    return llmcb_chat_batch(w->s.chat, prompts, n, &c);
}

/* Of handlers that know no chat start all are told the other one. */
TEST(case_045_every_handler_gets_every_start)
{
    world w;
    llmcb_op *op;
    size_t i;

    world_init(&w);
    world_ear(&w, "I", INLINE, 0)->h.sync.on_chat_model_start = NULL;
    world_ear(&w, "A", ASYNC, 0)->h.async.on_chat_model_start = NULL;
    world_ear(&w, "S", SYNC, 0)->h.sync.on_chat_model_start = NULL;
    world_open(&w);
    op = batch_of(&w, 2);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    for (i = 0; i < 3; i++) {
        CHECK_INT(w.ears[i]->told[LLMCB_LLM_START], 2);
        CHECK_INT(w.ears[i]->told[LLMCB_LLM_END], 2);
    }
    llmcb_op_free(op);
    world_close(&w);
}

static int act_count(ear *e, const llmcb_event *ev)
{
    if (starts(ev->kind)) note("%s:%.4s", e->name, ev->run->id);
    return 0;
}

TEST(case_046_starts_go_prompt_by_prompt)
{
    world w;
    llmcb_op *op;
    char want[128];
    size_t i, n = 0;
    const char *at;

    world_init(&w);
    for (i = 0; i < 2; i++)
        world_ear(&w, i ? "I2" : "I1", INLINE, 0)->act = act_count;
    world_open(&w);
    op = batch_of(&w, 3);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    at = trace;
    for (i = 0; i < 6 && at; i++) {
        n = (size_t)sprintf(want, "I%u:%.4s", (unsigned)i % 2 + 1,
                            llmcb_op_run_at(op, i / 2)->id);
        at = strstr(at, want);
        CHECK(at != NULL);
        if (at) at += n;
    }
    llmcb_op_free(op);
    world_close(&w);
}

/* A group is a run without a body: left normally, by an error, after an end
 * that was said before, cancelled. Its handlers see start and end. */
TEST(case_047_048_049_groups)
{
    int how;

    for (how = 0; how < 4; how++) {
        world w;
        ear *e;
        llmcb_config c;
        llmcb_error bad;
        llmcb_op *op, *call;

        world_init(&w);
        e = world_ear(&w, "A", ASYNC, 0);
        world_open(&w);
        c = world_config(&w);
        op = run_new(&w, LLMCB_RUN_CHAIN, "group", &c);
        call = chat_within(&w, llmcb_op_run(op), NULL);
        CHECK_INT(llmcb_op_wait(call), LLMCB_OK);
        CHECK_STR(llmcb_op_run(call)->parent_id, llmcb_op_run(op)->id);
        llmcb_op_free(call);
        memset(&bad, 0, sizeof bad);
        bad.code = LLMCB_EIO;
        strcpy(bad.message, "why");
        if (how == 0 || how == 2)
            CHECK_INT(llmcb_run_end(llmcb_op_run(op), str("x")), LLMCB_OK);
        if (how == 1)
            CHECK_INT(llmcb_run_fail(llmcb_op_run(op), &bad), bad.code);
        if (how < 3) {
            CHECK_INT(llmcb_run_end(llmcb_op_run(op), str("y")),
                      LLMCB_ESTATE);
            CHECK_INT(llmcb_run_fail(llmcb_op_run(op), &bad), LLMCB_ESTATE);
        } else {
            llmcb_op_cancel(op);
        }
        CHECK_INT(llmcb_op_wait(op), how == 1   ? LLMCB_EIO
                                     : how == 3 ? LLMCB_ECANCELLED
                                                : LLMCB_OK);
        if (how == 1) CHECK_STR(llmcb_op_error(op)->message, "why");
        CHECK_INT(llmcb_run_end(llmcb_op_run(op), str("z")), LLMCB_ESTATE);
        CHECK_STR(llmcb_op_output(op)->text.ptr, how % 2 ? "" : "x");
        CHECK(strncmp(e->log, "+group +ChatOpenAI ", 19) == 0);
        CHECK_INT(e->told[LLMCB_CHAIN_END], how % 2 == 0);
        CHECK_INT(e->told[LLMCB_CHAIN_ERROR], how % 2);
        llmcb_op_free(op);
        world_close(&w);
    }
}

/* C functions have no extra arguments: a name is all that can be missing. */
TEST(case_052_a_custom_event_without_a_name)
{
    world w;
    llmcb_op *op;

    world_init(&w);
    world_open(&w);
    op = run_new(&w, LLMCB_RUN_CHAIN, "r", NULL);
    CHECK_INT(llmcb_run_custom(llmcb_op_run(op), NULL, str("x")),
              LLMCB_EINVAL);
    CHECK_INT(llmcb_run_custom(llmcb_op_run(op), "", str("x")),
              LLMCB_EINVAL);
    CHECK_INT(llmcb_run_custom(NULL, "n", str("x")), LLMCB_ENOMEM);
    CHECK_INT(llmcb_run_custom(llmcb_op_run(op), "n", str("x")), LLMCB_OK);
    end_and_free(op, "");
    world_close(&w);
}

/* ======== ends ============================================================ */

typedef struct canceller {
    llmcb_op *op;
    int kind;
    llmcb_event_kind in;
} canceller;

static int act_cancel_in(ear *e, const llmcb_event *ev)
{
    canceller *c = (canceller *)e->user;

    if (ev->kind == c->in) llmcb_op_cancel(c->op);
    return 0;
}

/* Of a call and of a run: the caller sees the cancel, the handlers complete
 * and are told of no error. */
TEST(case_066_cancelled_while_the_end_is_told)
{
    int chat;

    for (chat = 0; chat < 2; chat++) {
        world w;
        canceller x;
        ear *a, *s;
        llmcb_config c;

        world_init(&w);
        a = world_ear(&w, "A", ASYNC, 0);
        s = world_ear(&w, "S", SYNC, 0);
        a->ms = 5;
        s->act = act_cancel_in;
        s->user = &x;
        x.in = chat ? LLMCB_LLM_END : LLMCB_CHAIN_END;
        world_open(&w);
        c = world_config(&w);
        x.op = chat ? chat_with(&w, &c)
                    : run_new(&w, LLMCB_RUN_CHAIN, "r", &c);
        if (!chat) speak_and_end(x.op, 0);
        CHECK_INT(llmcb_op_wait(x.op), LLMCB_ECANCELLED);
        CHECK_INT(llmcb_op_error(x.op)->detail, LLMCB_DETAIL_CALLER);
        CHECK_INT(a->told[x.in], 1);
        CHECK_INT(s->told[x.in], 1);
        CHECK_INT(a->inside, 0);
        llmcb_op_free(x.op);
        world_close(&w);
    }
}

/* ... and a loop that is freed then waits for the handlers. */
TEST(case_067_freeing_the_loop_waits_for_ends)
{
    int chat;

    for (chat = 0; chat < 2; chat++) {
        world w;
        gate g = GATE;
        ear *s;
        llmcb_config c;
        llmcb_op *op;

        world_init(&w);
        s = world_ear(&w, "S", SYNC, 0);
        s->gate = &g;
        s->gate_kind = chat ? LLMCB_LLM_END : LLMCB_CHAIN_END;
        world_ear(&w, "A", ASYNC, 0)->ms = 10;
        world_open(&w);
        c = world_config(&w);
        op = chat ? chat_with(&w, &c) : run_new(&w, LLMCB_RUN_CHAIN, "r", &c);
        if (!chat) speak_and_end(op, 0);
        turn_to_gate(&w.s, &g, 1);
        llmcb_op_cancel(op);
        turns(&w.s, 2);
        CHECK(!llmcb_op_done(op));
        gate_let(&g, ALL);
        world_close(&w); /* checks that it was told, and LLMCB_OK */
    }
}

/* Cancelled while the start is told: who got that gets one error. */
TEST(case_068_cancelled_while_the_start_is_told)
{
    int how;

    for (how = 0; how < 4; how++) {
        world w;
        gate g = GATE;
        ear *s, *a, *i, *late;
        llmcb_config c;
        llmcb_op *op;

        world_init(&w);
        i = world_ear(&w, "I", INLINE, 0);
        s = world_ear(&w, "S", SYNC, 0);
        a = world_ear(&w, "A", ASYNC, 0);
        a->ms = 50;
        s->gate = &g;
        s->gate_kind = how < 2 ? LLMCB_CHAIN_START : LLMCB_CHAT_MODEL_START;
        late = world_ear(&w, "L", ASYNC, LLMCB_AWAIT_EACH);
        world_open(&w);
        c = world_config(&w);
        op = how < 2 ? run_new(&w, LLMCB_RUN_CHAIN, "r", &c)
                     : chat_with(&w, &c);
        turn_to_gate(&w.s, &g, 1);
        if (how % 2)
            llmcb_op_free(op);
        else
            llmcb_op_cancel(op);
        turns(&w.s, 2);
        gate_let(&g, ALL);
        if (how % 2)
            CHECK_INT(llmcb_loop_run(w.s.loop), LLMCB_OK);
        else
            CHECK_INT(llmcb_op_wait(op), LLMCB_ECANCELLED);
        CHECK_INT(s->events, 2);
        CHECK_INT(a->events, 2);
        CHECK_INT(i->events, 2);
        CHECK_INT(late->events, 2);
        CHECK_INT(w.s.spy.requests, 0);
        CHECK_INT(w.tales[0].code, LLMCB_ECANCELLED);
        CHECK_INT(w.tales[0].detail, how % 2 ? LLMCB_DETAIL_CONSUMER
                                             : LLMCB_DETAIL_CALLER);
        if (how % 2 == 0) llmcb_op_free(op);
        world_close(&w);
    }
}

/* ======== trees =========================================================== */

/* A step of a sequence: brings what it was given, or fails. */
typedef struct step {
    const char *name;
    llmcb_code code; /* LLMCB_OK: a good end */
} step;

static llmcb_step step_body(llmcb_task *t)
{
    const step *s = (const step *)t->self;

    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_sleep(t, 1));
    if (s->code == LLMCB_OK) llmcb_run_end(llmcb_task_run(t), str(s->name));
    return s->code;
    LLMCB_END(t);
}

/* prompt | model | parser */
typedef struct sequence {
    world *w;
    step steps[3]; /* the second with the name "model" is a call */
    int begun;
} sequence;

typedef struct sequence_frame {
    int i;
    llmcb_op *op;
} sequence_frame;

static llmcb_step sequence_body(llmcb_task *t)
{
    sequence *q = (sequence *)t->self;
    sequence_frame *f = (sequence_frame *)t->frame;
    llmcb_config c;
    char tag[32];

    LLMCB_BEGIN(t);
    for (; f->i < 3; f->i++) {
        q->begun++;
        sprintf(tag, "seq:step:%d", f->i + 1);
        c = llmcb_run_child(llmcb_task_run(t), tag);
        if (strcmp(q->steps[f->i].name, "model") == 0)
            f->op = chat_with(q->w, &c);
        else
            f->op = run_body(q->w, q->steps[f->i].name, step_body, 0,
                             &q->steps[f->i], &c);
        LLMCB_AWAIT(t, llmcb_await(t, f->op));
        if (t->result != LLMCB_OK) {
            llmcb_run_fail(llmcb_task_run(t), llmcb_op_error(f->op));
            llmcb_op_free(f->op);
            break;
        }
        llmcb_op_free(f->op);
    }
    LLMCB_END(t);
}

TEST(case_096_097_a_sequence)
{
    int bad;

    for (bad = 0; bad < 2; bad++) {
        world w;
        sequence q = { NULL, { { "prompt", 0 }, { "model", 0 },
                               { "parser", 0 } }, 0 };
        ear *e;
        llmcb_config c;
        llmcb_op *op;
        size_t i;

        world_init(&w);
        world_all_ears(&w);
        e = w.ears[2];
        e->act = act_note_labels;
        world_open(&w);
        q.w = &w;
        if (bad) {
            q.steps[1].name = "middle";
            q.steps[1].code = LLMCB_EPROTO;
        }
        c = world_config(&w);
        op = run_body(&w, "root", sequence_body, sizeof(sequence_frame), &q,
                      &c);
        CHECK_INT(llmcb_op_wait(op), bad ? LLMCB_EPROTO : LLMCB_OK);
        for (i = 0; i < w.n_ears; i++)
            CHECK_STR(w.ears[i]->log,
                      bad ? "+root +prompt -prompt +middle !middle:EPROTO "
                            "!root:EPROTO"
                          : "+root +prompt -prompt +ChatOpenAI 'a' 'b' 'c' '' "
                            "-ChatOpenAI +parser -parser -root");
        CHECK_INT(q.begun, bad ? 2 : 3);
        CHECK(strstr(trace, "root[]") != NULL);
        CHECK(strstr(trace, "prompt[seq:step:1]") != NULL);
        CHECK(bad || strstr(trace, "ChatOpenAI[seq:step:2 ") != NULL);
        CHECK(bad || strstr(trace, "parser[seq:step:3]") != NULL);
        CHECK_INT(w.n_tales, bad ? 3 : 4);
        for (i = 1; i < w.n_tales; i++)
            CHECK_STR(w.tales[i].parent, llmcb_op_run(op)->id);
        llmcb_op_free(op);
        world_close(&w);
    }
}

TEST(case_100_a_cancelled_tool_or_retriever)
{
    llmcb_run_kind kind;

    for (kind = LLMCB_RUN_CHAIN; kind <= LLMCB_RUN_RETRIEVER; kind++) {
        static const llmcb_event_kind errors[] = { LLMCB_CHAIN_ERROR,
                                                   LLMCB_TOOL_ERROR,
                                                   LLMCB_RETRIEVER_ERROR };
        world w;
        llmcb_config c;
        llmcb_op *op;
        size_t i;

        world_init(&w);
        world_all_ears(&w);
        world_open(&w);
        c = world_config(&w);
        op = run_new(&w, kind, "r", &c);
        turns(&w.s, 3);
        llmcb_op_cancel(op);
        CHECK_INT(llmcb_op_wait(op), LLMCB_ECANCELLED);
        for (i = 0; i < w.n_ears; i++) {
            CHECK(w.ears[i]->told[errors[kind]] <= 1);
            CHECK_INT(w.ears[i]->told[errors[kind]] * 2, w.ears[i]->events);
        }
        CHECK_STR(w.ears[2]->log, "+r !r:ECANCELLED");
        llmcb_op_free(op);
        world_close(&w);
    }
}

static int act_check_documents(ear *e, const llmcb_event *ev)
{
    (void)e;
    if (ev->kind == LLMCB_RETRIEVER_START) {
        CHECK_STR(ev->start->input.ptr, "in");
        CHECK_STR(ev->start->description, "");
    }
    if (ev->kind != LLMCB_RETRIEVER_END) return 0;
    CHECK_INT(ev->output->n_documents, 2);
    CHECK_STR(ev->output->documents[0].content.ptr, "first");
    CHECK_STR(ev->output->documents[0].id.ptr, "1");
    CHECK_STR(ev->output->documents[0].metadata[0].key, "page");
    CHECK_STR(ev->output->documents[0].metadata[0].value, "7");
    CHECK_INT(ev->output->documents[1].content.len, 3);
    CHECK(memcmp(ev->output->documents[1].content.ptr, "a\0b", 4) == 0);
    CHECK_STR(ev->output->documents[1].id.ptr, "");
    CHECK_INT(ev->output->documents[1].n_metadata, 0);
    return 0;
}

TEST(case_102_a_retriever)
{
    world w;
    char first[] = "first", value[] = "7";
    llmcb_pair page[1];
    llmcb_document found[2];
    llmcb_config c;
    llmcb_op *op;
    size_t i;

    world_init(&w);
    world_all_ears(&w);
    for (i = 0; i < w.n_ears; i++) w.ears[i]->act = act_check_documents;
    world_open(&w);
    c = world_config(&w);
    op = run_new(&w, LLMCB_RUN_RETRIEVER, NULL, &c);
    CHECK_INT(llmcb_run_text(llmcb_op_run(op), str("looking")), LLMCB_OK);
    memset(found, 0, sizeof found);
    page[0].key = "page";
    page[0].value = value;
    found[0].content = str(first);
    found[0].id = str("1");
    found[0].metadata = page;
    found[0].n_metadata = 1;
    found[1].content.ptr = "a\0b";
    found[1].content.len = 3;
    CHECK_INT(llmcb_run_end_documents(llmcb_op_run(op), NULL, 1),
              LLMCB_EINVAL);
    page[0].value = NULL;
    CHECK_INT(llmcb_run_end_documents(llmcb_op_run(op), found, 2),
              LLMCB_EINVAL);
    page[0].value = value;
    found[1].n_metadata = 1; /* of which there are none */
    CHECK_INT(llmcb_run_end_documents(llmcb_op_run(op), found, 2),
              LLMCB_EINVAL);
    found[1].n_metadata = 0;
    CHECK_INT(llmcb_run_end_documents(llmcb_op_run(op), found, 2), LLMCB_OK);
    CHECK_INT(llmcb_run_end_documents(llmcb_op_run(op), found, 2),
              LLMCB_ESTATE);
    *first = *value = '?';
    CHECK_INT(llmcb_op_output(op)->n_documents, 0); /* under way */
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_INT(llmcb_op_output(op)->n_documents, 2);
    CHECK_STR(llmcb_op_output(op)->documents[0].content.ptr, "first");
    for (i = 0; i < w.n_ears; i++)
        CHECK_STR(w.ears[i]->log,
                  "+retriever retriever.text:looking -retriever");
    CHECK_INT(w.n_tales, 1);
    llmcb_op_free(op);
    world_close(&w);
}

/* Nothing is left of a run but its op, nothing of that when it is freed. */
TEST(case_103_fifty_runs_leave_nothing)
{
    world w;
    llmcb_config c;
    llmcb_op *op;
    size_t blocks = 0, bytes = 0;
    int i;

    world_init(&w);
    world_all_ears(&w);
    world_open(&w);
    for (i = 0; i < 50; i++) {
        static const step s = { "body", LLMCB_OK };
        c = world_config(&w);
        op = run_new(&w, LLMCB_RUN_CHAIN, "r", &c);
        speak_and_end(op, 3);
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        llmcb_op_free(op);
        op = run_body(&w, "b", step_body, 0, (void *)(size_t)&s, &c);
        CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
        llmcb_op_free(op);
        if (i < 2) {
            blocks = w.s.heap.blocks;
            bytes = w.s.heap.bytes;
        }
        CHECK(!w.s.loop->ops && !w.s.loop->pool->known);
    }
    /* spare blocks of logs are kept */
    CHECK(w.s.heap.blocks <= blocks + (LLMCBI_SPARE ? 6 : 0));
    CHECK(w.s.heap.bytes <= bytes + (LLMCBI_SPARE ? 6 * 1024 : 0));
    CHECK_INT(w.s.loop->timers_made, 0);
    world_close(&w);
}

/* Logs of many runs at once need many blocks; when all have ended, few are
 * kept for the next ones. */
TEST(a_burst_of_runs_gives_its_memory_back)
{
    enum { RUNS = 300 };
    llmcb_op *ops[RUNS];
    llmcb_config c;
    size_t before;
    world w;
    int i;

    world_init(&w);
    world_ear(&w, "A", SYNC, 0);
    world_open(&w);
    c = world_config(&w);
    for (i = 0; i < 2; i++) { /* what is made once is there then */
        ops[i] = run_new(&w, LLMCB_RUN_CHAIN, "r", &c);
        speak_and_end(ops[i], 3);
        CHECK_INT(llmcb_op_wait(ops[i]), LLMCB_OK);
        llmcb_op_free(ops[i]);
    }
    before = w.s.heap.bytes;
    for (i = 0; i < RUNS; i++) {
        ops[i] = run_new(&w, LLMCB_RUN_CHAIN, "r", &c);
        speak_and_end(ops[i], 20);
    }
    CHECK(w.s.heap.bytes > before + RUNS * 1024);
    for (i = 0; i < RUNS; i++) CHECK_INT(llmcb_op_wait(ops[i]), LLMCB_OK);
    for (i = 0; i < RUNS; i++) llmcb_op_free(ops[i]);
    CHECK(w.s.heap.bytes <= before + 80 * 1024);
    world_close(&w);
}

/* A fallback: the attempts are children of the wrapper. */
static llmcb_step fallback_body(llmcb_task *t)
{
    sequence *q = (sequence *)t->self;
    sequence_frame *f = (sequence_frame *)t->frame;
    llmcb_config c;

    LLMCB_BEGIN(t);
    for (; f->i < 3; f->i++) {
        c = llmcb_run_child(llmcb_task_run(t), NULL);
        f->op = run_body(q->w, q->steps[f->i].name, step_body, 0,
                         &q->steps[f->i], &c);
        LLMCB_AWAIT(t, llmcb_await(t, f->op));
        if (t->result == LLMCB_OK)
            llmcb_run_end(llmcb_task_run(t), llmcb_op_output(f->op)->text);
        llmcb_op_free(f->op);
        if (t->result == LLMCB_OK) break;
    }
    LLMCB_END(t);
}

TEST(case_104_a_fallback)
{
    world w;
    sequence q = { NULL, { { "x", LLMCB_EIO }, { "y", LLMCB_ETLS },
                           { "z", LLMCB_OK } }, 0 };
    llmcb_config c;
    llmcb_op *op;
    size_t i;

    world_init(&w);
    world_all_ears(&w);
    world_open(&w);
    q.w = &w;
    c = world_config(&w);
    op = run_body(&w, "f", fallback_body, sizeof(sequence_frame), &q, &c);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_STR(llmcb_op_output(op)->text.ptr, "z");
    for (i = 0; i < w.n_ears; i++)
        CHECK_STR(w.ears[i]->log, "+f +x !x:EIO +y !y:ETLS +z -z -f");
    for (i = 1; i < w.n_tales; i++)
        CHECK_STR(w.tales[i].parent, llmcb_op_run(op)->id);
    llmcb_op_free(op);
    world_close(&w);
}

/* Sums of one thread-safe handler over loops in eight threads. */
typedef struct sums {
    llmcb_handler h; /* first */
    pthread_mutex_t m;
    int64_t total[2];
} sums;

static int sums_end(llmcb_handler *h, const llmcb_event *ev)
{
    sums *s = (sums *)(void *)h;

    pthread_mutex_lock(&s->m);
    if (ev->result->usage.known)
        s->total[strcmp(ev->result->model_name.ptr, "m1") == 0] +=
            ev->result->usage.total_tokens;
    pthread_mutex_unlock(&s->m);
    return 0;
}

static void *sums_thread(void *arg)
{
    static const char bodies[2][160] = {
        OK_HEAD "data: {\"model\":\"m0\",\"choices\":[],\"usage\":{"
                "\"total_tokens\":3}}\n\ndata: [DONE]\n\n",
        OK_HEAD "data: {\"model\":\"m1\",\"choices\":[],\"usage\":{"
                "\"total_tokens\":5}}\n\ndata: [DONE]\n\n"
    };
    llmcb_handler *list[1];
    llmcb_recording tapes[2];
    llmcb_replay_desc rd;
    llmcb_chat_desc cd;
    llmcb_message m;
    llmcb_loop *loop = llmcb_loop_new(NULL);
    llmcb_chat *chat;
    int i;

    list[0] = &((sums *)arg)->h;
    memset(&rd, 0, sizeof rd);
    memset(&cd, 0, sizeof cd);
    memset(&m, 0, sizeof m);
    memset(tapes, 0, sizeof tapes);
    for (i = 0; i < 2; i++) {
        tapes[i].bytes = bodies[i];
        tapes[i].len = strlen(bodies[i]);
    }
    rd.recordings = tapes;
    rd.n_recordings = 2;
    cd.streaming = true;
    cd.base_url = "http://localhost/v1";
    cd.api_key = "";
    cd.transport = llmcb_replay_new(loop, &rd);
    cd.callbacks = list;
    cd.n_callbacks = 1;
    chat = llmcb_chat_new(loop, &cd);
    m.content = "hi";
    for (i = 0; i < 5; i++) { /* the last recording is played again */
        llmcb_op *op = llmcb_chat_generate(chat, &m, 1, NULL);
        llmcb_op_wait(op);
        llmcb_op_free(op);
    }
    llmcb_chat_free(chat);
    llmcb_loop_free(loop);
    return NULL;
}

TEST(case_105_usage_of_two_models_in_eight_threads)
{
    pthread_t threads[8];
    sums s;
    int i;

    memset(&s, 0, sizeof s);
    pthread_mutex_init(&s.m, NULL);
    s.h.sync.on_llm_end = sums_end;
    for (i = 0; i < 8; i++)
        REQUIRE(pthread_create(&threads[i], NULL, sums_thread, &s) == 0);
    for (i = 0; i < 8; i++) pthread_join(threads[i], NULL);
    CHECK_INT(s.total[0], 8 * 3);
    CHECK_INT(s.total[1], 8 * 4 * 5);
    pthread_mutex_destroy(&s.m);
}

/* The queue is the op's own; nothing of what came before is lost. Row 107 is
 * a rate limiter, which llmcb has not. */
TEST(case_106_a_reader_that_starts_late)
{
    world w;
    llmcb_message m;
    const llmcb_chunk *chunk;
    char all[32] = "";
    llmcb_op *op;
    int n = 0;

    world_init(&w);
    scene_tape(&w.s, OK_HEAD, "1|2|3|4|5" DONE, 0, LLMCB_REPLAY_KEEP);
    scene_open(&w.s);
    memset(&m, 0, sizeof m);
    m.content = "hi";
    op = llmcb_chat_stream(w.s.chat, &m, 1, NULL);
    while (!llmcb_op_done(op)) llmcb_loop_run_once(w.s.loop, LLMCB_FOREVER);
    while (llmcb_op_next(op, &chunk)) {
        strcat(all, chunk->text.ptr);
        n++;
    }
    CHECK_STR(all, "12345");
    CHECK_INT(n, 6);
    CHECK_INT(llmcb_op_code(op), LLMCB_OK);
    llmcb_op_free(op);
    world_close(&w);
}

/* ======== all kinds of events ============================================= */

#define RETRY_HEAD                                             \
    "HTTP/1.1 500 Oops\r\nretry-after-ms: 10\r\n"              \
    "Content-Length: 0\r\n\r\n"
#define BAD_HEAD                                               \
    "HTTP/1.1 400 Bad\r\nContent-Length: 0\r\n\r\n"

/* What a handler of everything is told of the scene below. */
static const struct {
    llmcb_event_kind kind;
    unsigned times, mask;
} kinds[] = {
    { LLMCB_LLM_START, 0, LLMCB_SKIP_LLM }, /* it has the other one */
    { LLMCB_CHAT_MODEL_START, 2, LLMCB_SKIP_LLM },
    { LLMCB_LLM_NEW_TOKEN, 4, LLMCB_SKIP_LLM },
    { LLMCB_LLM_END, 1, LLMCB_SKIP_LLM },
    { LLMCB_LLM_ERROR, 1, LLMCB_SKIP_LLM },
    { LLMCB_CHAIN_START, 2, LLMCB_SKIP_CHAIN },
    { LLMCB_CHAIN_END, 1, LLMCB_SKIP_CHAIN },
    { LLMCB_CHAIN_ERROR, 1, LLMCB_SKIP_CHAIN },
    { LLMCB_AGENT_ACTION, 2, LLMCB_SKIP_AGENT },
    { LLMCB_AGENT_FINISH, 1, LLMCB_SKIP_AGENT },
    { LLMCB_TOOL_START, 2, LLMCB_SKIP_AGENT },
    { LLMCB_TOOL_END, 1, LLMCB_SKIP_AGENT },
    { LLMCB_TOOL_ERROR, 1, LLMCB_SKIP_AGENT },
    { LLMCB_RETRIEVER_START, 2, LLMCB_SKIP_RETRIEVER },
    { LLMCB_RETRIEVER_END, 1, LLMCB_SKIP_RETRIEVER },
    { LLMCB_RETRIEVER_ERROR, 1, LLMCB_SKIP_RETRIEVER },
    { LLMCB_TEXT, 3, 0 },
    { LLMCB_RETRY, 1, LLMCB_SKIP_RETRY },
    { LLMCB_CUSTOM_EVENT, 1, LLMCB_SKIP_CUSTOM },
};

static void one_of_each_kind(world *w, const llmcb_config *c)
{
    llmcb_op *root = run_new(w, LLMCB_RUN_CHAIN, "root", c), *op;
    llmcb_action action;
    llmcb_error e;
    int kind, i;

    memset(&e, 0, sizeof e);
    e.code = LLMCB_EIO;
    memset(&action, 0, sizeof action);
    action.tool = str("add");
    action.input = str("{}");
    CHECK_INT(llmcb_run_action(llmcb_op_run(root), &action), LLMCB_OK);
    memset(&action, 0, sizeof action); /* all may be NULL */
    CHECK_INT(llmcb_run_action(llmcb_op_run(root), &action), LLMCB_OK);
    CHECK_INT(llmcb_run_action(llmcb_op_run(root), NULL), LLMCB_EINVAL);
    CHECK_INT(llmcb_run_action(NULL, &action), LLMCB_ENOMEM);
    for (kind = LLMCB_RUN_CHAIN; kind <= LLMCB_RUN_RETRIEVER; kind++)
        for (i = 0; i < 2; i++) {
            if (kind == LLMCB_RUN_CHAIN && i == 0) continue; /* the root */
            op = run_within(w, root, (llmcb_run_kind)kind, "part");
            if (i == 0) {
                llmcb_run_text(llmcb_op_run(op), str("t"));
                end_and_free(op, "");
            } else {
                llmcb_run_fail(llmcb_op_run(op), &e);
                CHECK_INT(llmcb_op_wait(op), LLMCB_EIO);
                llmcb_op_free(op);
            }
        }
    for (i = 0; i < 2; i++) {
        op = chat_within(w, llmcb_op_run(root), NULL);
        CHECK_INT(llmcb_run_action(llmcb_op_run(op), &action), LLMCB_ESTATE);
        CHECK_INT(llmcb_op_wait(op), i ? LLMCB_EHTTP : LLMCB_OK);
        llmcb_op_free(op);
    }
    CHECK_INT(llmcb_run_text(llmcb_op_run(root), str("t")), LLMCB_OK);
    CHECK_INT(llmcb_run_custom(llmcb_op_run(root), "n", str("d")), LLMCB_OK);
    CHECK_INT(llmcb_run_agent_finish(llmcb_op_run(root), str("so"), str("l")),
              LLMCB_OK);
    end_and_free(root, "");
}

/* All kinds of handlers hear all kinds of events, on their thread, but for
 * those that they skip. */
TEST(every_kind_of_event)
{
    unsigned mask;

    for (mask = 0; mask < 64; mask = mask ? 2 * mask : 1) {
        world w;
        llmcb_config c;
        size_t i, k;

        world_init(&w);
        w.partial = true;
        world_all_ears(&w);
        world_ear(&w, "L", INLINE, 0)->h.sync.on_chat_model_start = NULL;
        for (i = 0; i < w.n_ears; i++) w.ears[i]->h.skip = mask;
        scene_tape(&w.s, RETRY_HEAD, "", 0, LLMCB_REPLAY_KEEP);
        scene_tape(&w.s, OK_HEAD, "a|b|c" DONE, 0, LLMCB_REPLAY_KEEP);
        scene_tape(&w.s, BAD_HEAD, "", 0, LLMCB_REPLAY_KEEP);
        scene_open(&w.s);
        c = world_config(&w);
        one_of_each_kind(&w, &c);
        CHECK_INT(sizeof kinds / sizeof *kinds, LLMCB_N_EVENTS);
        for (i = 0; i < w.n_ears; i++) {
            const ear *e = w.ears[i];
            for (k = 0; k < LLMCB_N_EVENTS; k++) {
                unsigned want = kinds[k].mask & mask ? 0 : kinds[k].times;
                if (i == 6 && k <= 1) /* the fallback */
                    want = k == 0 && !(mask & LLMCB_SKIP_LLM) ? 2 : 0;
                CHECK_INT(kinds[k].kind, k);
                if (e->told[k] != want)
                    TEST_FAIL("%s: %s told %u times, not %u; skip %u",
                              e->name,
                              llmcb_event_name((llmcb_event_kind)k),
                              e->told[k], want, mask);
            }
            if (i == 0 || i == 3) CHECK_INT(e->here, 0);
            if (i == 1 || i == 2 || i == 4) CHECK_INT(e->here, e->events);
        }
        if (!mask)
            CHECK(strstr(w.ears[0]->log,
                         "+root root.action:add({}) root.action:() ") &&
                  strstr(w.ears[0]->log,
                         "root.text:t root.n=d root.finish:so/l -root"));
        world_close(&w);
    }
}

/* A handler that raises in any one kind of event ends what it is in, once. */
TEST(raised_in_every_kind_of_event)
{
    int kind;
    size_t at;

    for (at = 0; at < 3; at++)
        for (kind = 0; kind < LLMCB_N_EVENTS; kind++) {
            world w;
            llmcb_config c;
            llmcb_action action;
            llmcb_op *root, *op;

            if (kind < LLMCB_CHAIN_START || kind == LLMCB_RETRY) continue;
            world_init(&w);
            world_all_ears(&w);
            w.ears[at]->h.flags |= LLMCB_RAISE;
            w.ears[at]->act = act_fail_in;
            w.ears[at]->user = &kind;
            world_open(&w);
            c = world_config(&w);
            root = run_new(&w, LLMCB_RUN_CHAIN, "root", &c);
            memset(&action, 0, sizeof action);
            llmcb_run_action(llmcb_op_run(root), &action);
            llmcb_run_agent_finish(llmcb_op_run(root), str("x"), str(""));
            llmcb_run_text(llmcb_op_run(root), str("t"));
            llmcb_run_custom(llmcb_op_run(root), "n", str("t"));
            op = run_within(&w, root, LLMCB_RUN_TOOL, "tool");
            llmcb_run_end(llmcb_op_run(op), str(""));
            llmcb_op_wait(op);
            llmcb_op_free(op);
            op = run_within(&w, root, LLMCB_RUN_RETRIEVER, "retriever");
            llmcb_op_cancel(op);
            llmcb_op_wait(op);
            llmcb_op_free(op);
            if (kind < LLMCB_TOOL_START || kind >= LLMCB_TEXT)
                llmcb_run_end(llmcb_op_run(root), str(""));
            else /* parts of it fail, and that is all */
                CHECK_INT(llmcb_run_end(llmcb_op_run(root), str("")),
                          LLMCB_OK);
            llmcb_op_wait(root);
            if ((kind <= LLMCB_AGENT_FINISH && kind != LLMCB_CHAIN_ERROR) ||
                kind == LLMCB_TEXT || kind == LLMCB_CUSTOM_EVENT)
                CHECK_INT(llmcb_op_code(root), LLMCB_EHANDLER);
            else
                CHECK_INT(llmcb_op_code(root), LLMCB_OK);
            llmcb_op_free(root);
            world_close(&w);
            if (test_failures_here) {
                printf("  %s raised in %s\n", w.s.n_tapes ? "a handler" : "",
                       llmcb_event_name((llmcb_event_kind)kind));
                return;
            }
        }
}

/* ======== cancelled at every moment ======================================= */

typedef enum how {
    CANCEL_ROOT,
    CANCEL_CHILD,
    CANCEL_CALL,
    CANCEL_ALL,
    CANCEL_THRICE,
    CANCEL_BY_THREAD,
    FREE_ROOT,
    FREE_CHILD,
    FREE_ALL,
    FREE_THE_LOOP,
    FAIL_ROOT,
    END_ROOT,
    N_HOWS
} how;

/* root, a body, makes child, a body, which makes a call and leaves a run
 * open. Who frees an op sets it to NULL, which all calls take. */
typedef struct tree {
    world *w;
    llmcb_op *root, *child, *call, *left;
} tree;

static llmcb_step tree_child(llmcb_task *t)
{
    tree *x = (tree *)t->self;
    llmcb_config c;

    LLMCB_BEGIN(t);
    c = llmcb_run_child(llmcb_task_run(t), NULL);
    x->left = run_new(x->w, LLMCB_RUN_TOOL, "left", &c);
    x->call = chat_with(x->w, &c);
    LLMCB_AWAIT(t, llmcb_await(t, x->call));
    if (t->result != LLMCB_OK) return t->result;
    llmcb_run_end(llmcb_op_run(x->left), str("left"));
    LLMCB_AWAIT(t, llmcb_await(t, x->left));
    llmcb_run_end(llmcb_task_run(t), str("child"));
    return t->result;
    LLMCB_END(t);
}

static llmcb_step tree_root(llmcb_task *t)
{
    tree *x = (tree *)t->self;
    llmcb_config c;

    LLMCB_BEGIN(t);
    c = llmcb_run_child(llmcb_task_run(t), NULL);
    x->child = run_body(x->w, "child", tree_child, 0, x, &c);
    LLMCB_AWAIT(t, llmcb_await(t, x->child));
    if (t->result != LLMCB_OK) return t->result;
    llmcb_run_end(llmcb_task_run(t), str("root"));
    LLMCB_END(t);
}

static void *cancel_thread(void *arg)
{
    llmcb_op_cancel((llmcb_op *)arg);
    return NULL;
}

static void free_op(llmcb_op **op)
{
    llmcb_op *gone = *op;

    *op = NULL;
    llmcb_op_free(gone);
}

static void tree_act(tree *x, how h)
{
    llmcb_error e;
    pthread_t thread;
    int i;

    memset(&e, 0, sizeof e);
    e.code = LLMCB_EPROTO;
    switch (h) {
    case CANCEL_ROOT: llmcb_op_cancel(x->root); break;
    case CANCEL_CHILD: llmcb_op_cancel(x->child); break;
    case CANCEL_CALL: llmcb_op_cancel(x->call); break;
    case CANCEL_ALL:
        llmcb_op_cancel(x->root);
        llmcb_op_cancel(x->child);
        llmcb_op_cancel(x->left);
        llmcb_op_cancel(x->call);
        break;
    case CANCEL_THRICE:
        for (i = 0; i < 3; i++) {
            llmcb_op_cancel(x->root);
            if (!x->w->s.loop->turning) turns(&x->w->s, 1);
        }
        break;
    case CANCEL_BY_THREAD:
        if (!x->root) break;
        if (pthread_create(&thread, NULL, cancel_thread, x->root)) abort();
        pthread_join(thread, NULL);
        break;
    case FREE_ROOT: free_op(&x->root); break;
    case FREE_CHILD: free_op(&x->child); break;
    case FREE_ALL:
        free_op(&x->root);
        free_op(&x->left);
        free_op(&x->child);
        free_op(&x->call);
        break;
    case FAIL_ROOT: llmcb_run_fail(llmcb_op_run(x->root), &e); break;
    case END_ROOT: llmcb_run_end(llmcb_op_run(x->root), str("!")); break;
    default: break;
    }
}

/* false: the tree was done before that turn. */
static bool tree_ended_in_turn(how h, int turn, int64_t ms)
{
    world w;
    tree x;
    llmcb_config c;
    llmcb_code code;
    bool done;
    int i;

    world_init(&w);
    world_all_ears(&w);
    w.ears[1]->ms = ms;
    world_open(&w);
    memset(&x, 0, sizeof x);
    x.w = &w;
    c = world_config(&w);
    x.root = run_body(&w, "root", tree_root, 0, &x, &c);
    for (i = 0; i < turn && !llmcb_op_done(x.root); i++)
        llmcb_loop_run_once(w.s.loop, LLMCB_FOREVER);
    done = llmcb_op_done(x.root);
    if (h != FREE_THE_LOOP) {
        tree_act(&x, h);
        CHECK_INT(llmcb_loop_run(w.s.loop), LLMCB_OK);
        code = llmcb_op_code(x.root);
        if (!done && x.root && h <= CANCEL_BY_THREAD && h != CANCEL_CHILD &&
            h != CANCEL_CALL)
            CHECK(code == LLMCB_ECANCELLED || code == LLMCB_OK);
        if (done && x.root) CHECK_INT(code, LLMCB_OK);
        if (!done && h == CANCEL_ROOT && code == LLMCB_ECANCELLED)
            CHECK_INT(llmcb_op_error(x.root)->detail, LLMCB_DETAIL_CALLER);
        if (h == CANCEL_ROOT && llmcb_op_code(x.child) == LLMCB_ECANCELLED)
            CHECK(llmcb_op_error(x.child)->detail == LLMCB_DETAIL_PARENT ||
                  llmcb_op_error(x.child)->detail == LLMCB_DETAIL_NONE);
        llmcb_op_free(x.root);
        llmcb_op_free(x.left);
        llmcb_op_free(x.call);
        llmcb_op_free(x.child);
    }
    world_close(&w);
    if (test_failures_here) printf("  %d in turn %d\n", (int)h, turn);
    return !done && !test_failures_here;
}

TEST(a_tree_ended_in_every_turn)
{
    int h, turn;

    for (h = 0; h < N_HOWS && !test_failures_here; h++) {
        for (turn = 0; tree_ended_in_turn((how)h, turn, 0);) turn++;
        CHECK(turn > 10);
        for (turn = 0; tree_ended_in_turn((how)h, turn, 7);) turn++;
    }
}

typedef struct in_event {
    tree *x;
    how h;
    unsigned at;
} in_event;

/* Only handlers on the loop's thread do more than to cancel. */
static int act_tree(ear *e, const llmcb_event *ev)
{
    in_event *n = (in_event *)e->user;

    (void)ev;
    if (e->events == n->at) tree_act(n->x, n->h);
    return 0;
}

static void tree_ended_in_event(how h, size_t who, unsigned at)
{
    world w;
    tree x;
    in_event n;
    llmcb_config c;

    world_init(&w);
    world_all_ears(&w);
    memset(&x, 0, sizeof x);
    n.x = &x;
    n.h = h;
    n.at = at;
    w.ears[who]->act = act_tree;
    w.ears[who]->user = &n;
    world_open(&w);
    x.w = &w;
    c = world_config(&w);
    x.root = run_body(&w, "root", tree_root, 0, &x, &c);
    CHECK_INT(llmcb_loop_run(w.s.loop), LLMCB_OK);
    llmcb_op_free(x.root);
    llmcb_op_free(x.left);
    llmcb_op_free(x.call);
    llmcb_op_free(x.child);
    world_close(&w);
    if (test_failures_here)
        printf("  %d in event %u of %u\n", (int)h, at, (unsigned)who);
}

TEST(a_tree_ended_in_every_event)
{
    int h;
    unsigned at;

    for (h = 0; h < N_HOWS; h++)
        for (at = 1; at <= 12 && !test_failures_here; at++) {
            if (h == FREE_THE_LOOP) continue;
            tree_ended_in_event((how)h, 1, at);
            tree_ended_in_event((how)h, 2, at);
            tree_ended_in_event((how)h, 4, at);
            if (h <= CANCEL_CALL) tree_ended_in_event((how)h, 0, at);
        }
}

/* After the end a cancel changes nothing. */
TEST(a_cancel_after_the_end)
{
    world w;
    llmcb_config c;
    llmcb_op *op;

    world_init(&w);
    world_all_ears(&w);
    world_open(&w);
    c = world_config(&w);
    op = run_new(&w, LLMCB_RUN_CHAIN, "r", &c);
    llmcb_run_end(llmcb_op_run(op), str("x"));
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    llmcb_op_cancel(op);
    turns(&w.s, 3);
    CHECK_INT(llmcb_op_code(op), LLMCB_OK);
    CHECK_STR(w.ears[0]->log, "+r -r");
    llmcb_op_free(op);
    world_close(&w);
}

/* ======== forgotten runs ================================================== */

typedef enum forgotten {
    OP_FREED,
    LOOP_FREED,
    PARENT_ENDED,
    PARENT_FAILED,
    PARENT_CANCELLED,
    PARENT_FREED,
    N_FORGOTTEN
} forgotten;

/* A run that nobody ends is ended, with what is within it, before its
 * parent. */
TEST(a_forgotten_run_is_ended)
{
    int f;
    size_t i;

    for (f = 0; f < N_FORGOTTEN; f++) {
        world w;
        llmcb_config c;
        llmcb_error e;
        llmcb_op *root, *op, *deep, *call;

        world_init(&w);
        world_all_ears(&w);
        world_open(&w);
        memset(&e, 0, sizeof e);
        e.code = LLMCB_EIO;
        c = world_config(&w);
        root = run_new(&w, LLMCB_RUN_CHAIN, "root", &c);
        op = run_within(&w, root, LLMCB_RUN_CHAIN, "op");
        deep = run_within(&w, op, LLMCB_RUN_TOOL, "deep");
        call = chat_within(&w, llmcb_op_run(deep), NULL);
        while (w.s.spy.requests < 1)
            llmcb_loop_run_once(w.s.loop, LLMCB_FOREVER);
        switch (f) {
        case OP_FREED:
            llmcb_op_free(op);
            CHECK_INT(llmcb_op_wait(deep), LLMCB_ECANCELLED);
            CHECK_INT(llmcb_op_error(deep)->detail, LLMCB_DETAIL_PARENT);
            end_and_free(root, "x"); /* it is as well as before */
            break;
        case LOOP_FREED: break;
        case PARENT_ENDED: end_and_free(root, "x"); break;
        case PARENT_FAILED:
            llmcb_run_fail(llmcb_op_run(root), &e);
            CHECK_INT(llmcb_op_wait(root), LLMCB_EIO);
            llmcb_op_free(root);
            break;
        case PARENT_CANCELLED:
            llmcb_op_cancel(root);
            CHECK_INT(llmcb_op_wait(root), LLMCB_ECANCELLED);
            llmcb_op_free(root);
            break;
        default:
            llmcb_op_free(root);
            CHECK_INT(llmcb_loop_run(w.s.loop), LLMCB_OK);
        }
        if (f != LOOP_FREED) {
            CHECK_INT(llmcb_op_code(deep), LLMCB_ECANCELLED);
            CHECK_INT(llmcb_op_code(call), LLMCB_ECANCELLED);
            CHECK_INT(llmcb_op_error(call)->detail, LLMCB_DETAIL_PARENT);
            if (f != OP_FREED) {
                CHECK_INT(llmcb_op_error(op)->detail, LLMCB_DETAIL_PARENT);
                llmcb_op_free(op);
            }
            llmcb_op_free(deep);
            llmcb_op_free(call);
        }
        for (i = 0; i < w.n_ears && f != LOOP_FREED; i++)
            CHECK_STR(w.ears[i]->log,
                      f == PARENT_FAILED
                          ? "+root +op +deep +ChatOpenAI !ChatOpenAI:ECANCELLED"
                            " !deep:ECANCELLED !op:ECANCELLED !root:EIO"
                      : f == OP_FREED || f == PARENT_ENDED
                          ? "+root +op +deep +ChatOpenAI !ChatOpenAI:ECANCELLED"
                            " !deep:ECANCELLED !op:ECANCELLED -root"
                          : "+root +op +deep +ChatOpenAI !ChatOpenAI:ECANCELLED"
                            " !deep:ECANCELLED !op:ECANCELLED"
                            " !root:ECANCELLED");
        world_close(&w);
        if (test_failures_here) {
            printf("  forgotten in way %d\n", f);
            return;
        }
    }
}

/* A body that leaves a run without a body, one with and a call behind, and
 * ends as it is told. */
typedef struct leaver {
    world *w;
    llmcb_op *manual, *other, *call;
    llmcb_code code;
    bool sleeps, begun;
    step step;
} leaver;

static llmcb_step leaver_body(llmcb_task *t)
{
    leaver *l = (leaver *)t->self;
    llmcb_config c;

    LLMCB_BEGIN(t);
    c = llmcb_run_child(llmcb_task_run(t), NULL);
    l->manual = run_new(l->w, LLMCB_RUN_CHAIN, "manual", &c);
    l->other = run_body(l->w, "other", step_body, 0, &l->step, &c);
    l->call = chat_with(l->w, &c);
    if (l->sleeps) LLMCB_AWAIT(t, llmcb_sleep(t, LLMCB_FOREVER));
    return l->code;
    LLMCB_END(t);
}

TEST(what_a_body_leaves_behind)
{
    int i;

    for (i = 0; i < 3; i++) { /* it ends well, fails, is cancelled */
        world w;
        leaver l;
        llmcb_config c;
        llmcb_op *op;

        world_init(&w);
        world_all_ears(&w);
        world_open(&w);
        memset(&l, 0, sizeof l);
        l.w = &w;
        l.code = i == 1 ? LLMCB_ETLS : LLMCB_OK;
        l.sleeps = i == 2;
        l.step.name = "other";
        c = world_config(&w);
        op = run_body(&w, "root", leaver_body, 0, &l, &c);
        if (i == 2) {
            while (w.s.spy.requests < 1)
                llmcb_loop_run_once(w.s.loop, LLMCB_FOREVER);
            llmcb_op_cancel(op);
        }
        CHECK_INT(llmcb_op_wait(op), i == 0   ? LLMCB_OK
                                     : i == 1 ? LLMCB_ETLS
                                              : LLMCB_ECANCELLED);
        CHECK_INT(llmcb_op_code(l.manual), LLMCB_ECANCELLED);
        CHECK_INT(llmcb_op_error(l.manual)->detail, LLMCB_DETAIL_PARENT);
        CHECK_INT(llmcb_op_code(l.other), i ? LLMCB_ECANCELLED : LLMCB_OK);
        CHECK_INT(llmcb_op_code(l.call), i ? LLMCB_ECANCELLED : LLMCB_OK);
        llmcb_op_free(op);
        llmcb_op_free(l.manual);
        llmcb_op_free(l.other);
        llmcb_op_free(l.call);
        world_close(&w);
    }
}

/* A run that was ended is not left open, however slow its handlers are. */
TEST(ended_in_order_with_its_parent)
{
    int i;

    for (i = 0; i < 6; i++) {
        world w;
        llmcb_config c;
        llmcb_op *root, *op;

        world_init(&w);
        world_all_ears(&w);
        w.ears[1]->ms = i % 3 * 10;
        world_open(&w);
        c = world_config(&w);
        root = run_new(&w, LLMCB_RUN_CHAIN, "root", &c);
        op = run_within(&w, root, LLMCB_RUN_CHAIN, "op");
        llmcb_run_text(llmcb_op_run(op), str("t"));
        if (i < 3)
            while (!w.ears[2]->told[LLMCB_TEXT])
                llmcb_loop_run_once(w.s.loop, LLMCB_FOREVER);
        CHECK_INT(llmcb_run_end(llmcb_op_run(op), str("op")), LLMCB_OK);
        CHECK_INT(llmcb_run_end(llmcb_op_run(root), str("root")), LLMCB_OK);
        CHECK_INT(llmcb_op_wait(root), LLMCB_OK);
        CHECK_INT(llmcb_op_code(op), LLMCB_OK);
        CHECK_STR(llmcb_op_output(op)->text.ptr, "op");
        CHECK_STR(w.ears[0]->log, "+root +op op.text:t -op -root");
        llmcb_op_free(op);
        llmcb_op_free(root);
        world_close(&w);
    }
}

/* What a body brings may be said before what is within it has ended. */
static llmcb_step early_body(llmcb_task *t)
{
    leaver *l = (leaver *)t->self;
    llmcb_config c;

    LLMCB_BEGIN(t);
    c = llmcb_run_child(llmcb_task_run(t), NULL);
    l->manual = run_new(l->w, LLMCB_RUN_CHAIN, "manual", &c);
    CHECK_INT(llmcb_run_end(llmcb_task_run(t), str("early")), LLMCB_OK);
    CHECK_INT(llmcb_run_end(llmcb_task_run(t), str("late")), LLMCB_ESTATE);
    LLMCB_AWAIT(t, llmcb_sleep(t, 10));
    CHECK_INT(llmcb_run_text(llmcb_task_run(t), str("t")), LLMCB_OK);
    CHECK_INT(llmcb_run_end(llmcb_op_run(l->manual), str("m")), LLMCB_OK);
    c = llmcb_run_child(llmcb_task_run(t), NULL);
    l->other = run_new(l->w, LLMCB_RUN_CHAIN, "other", &c); /* too late */
    CHECK(llmcb_op_done(l->other));
    CHECK_INT(llmcb_op_code(l->other), LLMCB_ESTATE);
    CHECK(llmcb_op_run(l->other) == NULL);
    LLMCB_END(t);
}

TEST(a_body_goes_on_when_it_has_said_what_it_brings)
{
    world w;
    leaver l;
    llmcb_config c;
    llmcb_op *op;

    world_init(&w);
    world_all_ears(&w);
    world_open(&w);
    memset(&l, 0, sizeof l);
    l.w = &w;
    c = world_config(&w);
    op = run_body(&w, "root", early_body, 0, &l, &c);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_STR(llmcb_op_output(op)->text.ptr, "early");
    CHECK_INT(llmcb_op_code(l.manual), LLMCB_OK);
    CHECK_INT(llmcb_loop_now(w.s.loop), 10);
    llmcb_op_free(op);
    llmcb_op_free(l.manual);
    llmcb_op_free(l.other);
    world_close(&w);
}

/* Turns until op is done. false: it hangs, and is cancelled. */
static bool ends_in_time(world *w, llmcb_op *op)
{
    int i;

    for (i = 0; i < 1000 && !llmcb_op_done(op); i++) {
        llmcbi_lock(w->s.loop); /* a worker may be at it */
        if (!llmcbi_pool_idle(w->s.loop)) i = 0;
        llmcbi_unlock(w->s.loop);
        llmcb_loop_run_once(w->s.loop, 0);
    }
    if (i < 1000) return true;
    llmcb_op_cancel(op);
    llmcb_op_wait(op);
    return false;
}

/* Ended well before its start was told: what is within it begins and is
 * waited for all the same. */
TEST(ended_before_it_was_open)
{
    int i;

    for (i = 0; i < 4; i++) {
        world w;
        llmcb_config c;
        llmcb_error e;
        llmcb_op *root, *op, *call;
        step s = { "op", LLMCB_OK };

        world_init(&w);
        world_all_ears(&w);
        w.ears[1]->ms = i % 2 * 5;
        world_open(&w);
        c = world_config(&w);
        memset(&e, 0, sizeof e);
        e.code = LLMCB_EIO;
        root = run_new(&w, LLMCB_RUN_CHAIN, "root", &c);
        c = llmcb_run_child(llmcb_op_run(root), NULL);
        op = run_body(&w, "op", step_body, 0, &s, &c);
        call = chat_with(&w, &c);
        if (i < 2)
            llmcb_run_end(llmcb_op_run(root), str("root"));
        else
            llmcb_run_fail(llmcb_op_run(root), &e);
        CHECK(ends_in_time(&w, root));
        CHECK_INT(llmcb_op_code(root), i < 2 ? LLMCB_OK : LLMCB_EIO);
        CHECK_INT(llmcb_op_code(op), i < 2 ? LLMCB_OK : LLMCB_ECANCELLED);
        CHECK_INT(llmcb_op_code(call), i < 2 ? LLMCB_OK : LLMCB_ECANCELLED);
        llmcb_op_free(root);
        llmcb_op_free(op);
        llmcb_op_free(call);
        world_close(&w);
    }
}

/* ======== misuse and odd moments ========================================== */

/* A start handler that awaits a child would wait for itself. */
static llmcb_step await_child(llmcb_task *t, llmcb_handler *h,
                              const llmcb_event *ev)
{
    leaver *l = (leaver *)h->user;
    llmcb_op **call = (llmcb_op **)t->frame;

    LLMCB_BEGIN(t);
    *call = chat_within(l->w, ev->run, NULL);
    LLMCB_AWAIT(t, llmcb_await(t, *call));
    l->code = t->result;
    if (l->sleeps) {
        LLMCB_AWAIT(t, llmcb_await_run(t, llmcb_op_run(*call)));
        CHECK_INT(t->result, l->code);
        LLMCB_AWAIT(t, llmcb_await_all(t, call, 1, 1000000));
        CHECK_INT(t->result, l->code);
    }
    llmcb_op_free(*call);
    LLMCB_END(t);
}

TEST(awaiting_a_child_from_a_start_handler_is_refused)
{
    int i;

    for (i = 0; i < 2; i++) { /* from a start; from a text, where it may */
        world w;
        leaver l;
        llmcb_config c;
        llmcb_op *op;
        llmcb_handler h, *list[1];

        world_init(&w);
        world_open(&w);
        memset(&l, 0, sizeof l);
        memset(&h, 0, sizeof h);
        memset(&c, 0, sizeof c);
        l.w = &w;
        l.sleeps = i == 0;
        l.code = LLMCB_EINVAL;
        h.user = &l;
        h.frame_size = sizeof(llmcb_op *);
        if (i)
            h.async.on_text = await_child;
        else
            h.async.on_chain_start = await_child;
        list[0] = &h;
        c.local_callbacks = list;
        c.n_local_callbacks = 1;
        op = run_new(&w, LLMCB_RUN_CHAIN, "root", &c);
        turns(&w.s, 5);
        llmcb_run_text(llmcb_op_run(op), str("t"));
        turns(&w.s, 5);
        CHECK(llmcb_run_end(llmcb_op_run(op), str("")) == LLMCB_OK);
        CHECK(ends_in_time(&w, op));
        if (!i) CHECK_INT(l.code, LLMCB_ESTATE);
        if (i) CHECK_INT(l.code, LLMCB_OK);
        llmcb_op_free(op);
        world_close(&w);
    }
}

/* Awaiting what one is part of. */
static llmcb_step await_up(llmcb_task *t)
{
    tree *x = (tree *)t->self;

    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_await(t, x->child));
    CHECK_INT(t->result, LLMCB_ESTATE);
    LLMCB_AWAIT(t, llmcb_await(t, x->root));
    CHECK_INT(t->result, LLMCB_ESTATE);
    LLMCB_AWAIT(t, llmcb_await_any(t, &x->root, 1, LLMCB_FOREVER));
    CHECK_INT(t->result, LLMCB_ESTATE);
    LLMCB_AWAIT(t, llmcb_await_run(t, llmcb_op_run(x->root)));
    CHECK_INT(t->result, LLMCB_OK);
    LLMCB_AWAIT(t, llmcb_await_run(t, llmcb_task_run(t)));
    CHECK_INT(t->result, LLMCB_OK);
    LLMCB_AWAIT(t, llmcb_await_run(t, NULL));
    CHECK_INT(t->result, LLMCB_ENOMEM);
    CHECK(llmcb_task_run(t) == llmcb_op_run(x->child));
    LLMCB_END(t);
}

static llmcb_step handler_awaits_up(llmcb_task *t, llmcb_handler *h,
                                    const llmcb_event *ev)
{
    tree *x = (tree *)h->user;

    LLMCB_BEGIN(t);
    CHECK(llmcb_task_run(t) == NULL); /* a handler is no body */
    if (strcmp(ev->run->name, "child") != 0) return LLMCB_DONE;
    LLMCB_AWAIT(t, llmcb_await(t, x->child));
    CHECK_INT(t->result, LLMCB_ESTATE);
    LLMCB_AWAIT(t, llmcb_await(t, x->root));
    CHECK_INT(t->result, LLMCB_ESTATE);
    LLMCB_AWAIT(t, llmcb_await_run(t, ev->run));
    CHECK_INT(t->result, LLMCB_ESTATE);
    LLMCB_AWAIT(t, llmcb_await_run(t, llmcb_op_run(x->root)));
    CHECK_INT(t->result, LLMCB_OK);
    LLMCB_END(t);
}

static llmcb_step no_run(llmcb_task *t)
{
    CHECK(llmcb_task_run(t) == NULL);
    return LLMCB_DONE;
}

TEST(awaiting_ancestors_is_refused)
{
    world w;
    tree x;
    llmcb_handler h, *list[1];
    llmcb_config c;
    llmcb_op *op;

    world_init(&w);
    world_open(&w);
    memset(&x, 0, sizeof x);
    memset(&h, 0, sizeof h);
    memset(&c, 0, sizeof c);
    h.user = &x;
    h.async.on_chain_start = h.async.on_chain_end = handler_awaits_up;
    list[0] = &h;
    c.callbacks = list;
    c.n_callbacks = 1;
    x.root = run_new(&w, LLMCB_RUN_CHAIN, "root", &c);
    c = llmcb_run_child(llmcb_op_run(x.root), NULL);
    x.child = run_body(&w, "child", await_up, 0, &x, &c);
    CHECK_INT(llmcb_op_wait(x.child), LLMCB_OK);
    llmcb_op_free(x.child);
    end_and_free(x.root, "");
    op = llmcb_task_start(w.s.loop, no_run, 0, NULL);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    llmcb_op_free(op);
    CHECK(llmcb_task_run(NULL) == NULL);
    world_close(&w);
}

/* A run that the program fails with what is no error, or with a handler's
 * failure that is none: that of a real one behind it is attached. */
static int act_fail_error(ear *e, const llmcb_event *ev)
{
    (void)e;
    return ev->kind == LLMCB_CHAIN_ERROR ? 77 : 0;
}

TEST(failed_by_the_program_in_odd_ways)
{
    int i;

    for (i = 0; i < 3; i++) {
        world w;
        llmcb_config c;
        llmcb_error e;
        llmcb_op *op;
        llmcb_code want = i == 2 ? LLMCB_EHANDLER : LLMCB_EINVAL;

        world_init(&w);
        world_ear(&w, "I", INLINE, LLMCB_RAISE)->act = act_fail_error;
        world_open(&w);
        c = world_config(&w);
        op = run_new(&w, LLMCB_RUN_CHAIN, "r", &c);
        memset(&e, 0, sizeof e);
        e.code = i == 2 ? LLMCB_EHANDLER : LLMCB_OK;
        strcpy(e.message, "mine");
        CHECK_INT(llmcb_run_fail(llmcb_op_run(op), i ? &e : NULL), want);
        CHECK_INT(llmcb_op_wait(op), want);
        CHECK(!!strstr(llmcb_op_error(op)->message, "mine") == (i == 2));
        CHECK_INT(llmcb_op_error(op)->handler_result, 77);
        llmcb_op_free(op);
        world_close(&w);
    }
}

static void check_tame(const char *s, const char *a, const char *b)
{
    const char *p;

    CHECK(strstr(s, a) && strstr(s, b));
    for (p = s; *p; p++)
        if ((unsigned char)*p < 0x20 || *p == 0x7f)
            TEST_FAIL("control character %d in \"%s\"", *p, a);
}

static int act_tame_error(ear *e, const llmcb_event *ev)
{
    (void)e;
    if (!ev->error) return 0;
    check_tame(ev->error->message, "bad", "line");
    check_tame(ev->error->type, "ty", "pe");
    check_tame(ev->error->provider_code, "co", "de");
    return 0;
}

/* What a program passes on of a server does nothing to a terminal. */
TEST(failed_with_control_characters)
{
    world w;
    llmcb_config c;
    llmcb_error e;
    llmcb_op *op;
    size_t i;

    world_init(&w);
    world_all_ears(&w);
    for (i = 0; i < w.n_ears; i++) w.ears[i]->act = act_tame_error;
    world_open(&w);
    c = world_config(&w);
    op = run_new(&w, LLMCB_RUN_CHAIN, "r", &c);
    memset(&e, 0, sizeof e);
    e.code = LLMCB_EAPI;
    strcpy(e.message, "bad\x1b[2J\r\nforged:\x7f line");
    strcpy(e.type, "ty\x01pe");
    strcpy(e.provider_code, "co\tde");
    CHECK_INT(llmcb_run_fail(llmcb_op_run(op), &e), LLMCB_EAPI);
    CHECK_INT(llmcb_op_wait(op), LLMCB_EAPI);
    check_tame(llmcb_op_error(op)->message, "bad", "line");
    check_tame(llmcb_op_error(op)->type, "ty", "pe");
    check_tame(llmcb_op_error(op)->provider_code, "co", "de");
    for (i = 0; i < w.n_ears; i++)
        CHECK_INT(w.ears[i]->told[LLMCB_CHAIN_ERROR], 1);
    llmcb_op_free(op);
    world_close(&w);
}

/* Fills the window and waits for room. */
typedef struct filler {
    llmcb_run *run;
    int n, limit;
    llmcb_code second;
} filler;

static llmcb_step fill(llmcb_task *t)
{
    filler *f = (filler *)t->self;

    LLMCB_BEGIN(t);
    while (f->n < f->limit) {
        llmcb_code code = llmcb_run_text(f->run, str("x"));
        if (code == LLMCB_OK) {
            f->n++;
            continue;
        }
        CHECK_INT(code, LLMCB_EBUSY);
        LLMCB_AWAIT(t, llmcb_await_run(t, f->run));
        CHECK_INT(t->result, LLMCB_OK);
    }
    LLMCB_AWAIT(t, llmcb_await_run(t, f->run));
    CHECK_INT(t->result, LLMCB_OK);
    LLMCB_END(t);
}

static llmcb_step second_waiter(llmcb_task *t)
{
    filler *f = (filler *)t->self;

    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_await_run(t, f->run));
    f->second = t->result;
    LLMCB_END(t);
}

TEST(awaiting_a_run)
{
    world w;
    filler f;
    gate g = GATE;
    llmcb_action action;
    llmcb_config c;
    llmcb_op *op, *a, *b;
    ear *s;

    world_init(&w);
    w.s.ld.virtual_clock = false; /* one wakes the loop whenever all rests */
    s = world_ear(&w, "S", SYNC, 0);
    s->gate = &g;
    s->gate_kind = LLMCB_TEXT;
    world_ear(&w, "A", ASYNC, 0);
    world_open(&w);
    c = world_config(&w);
    op = run_new(&w, LLMCB_RUN_CHAIN, "r", &c);
    memset(&f, 0, sizeof f);
    f.run = llmcb_op_run(op);
    f.limit = 3000;
    a = llmcb_task_start(w.s.loop, fill, 0, &f);
    turn_to_gate(&w.s, &g, 1);
    turns(&w.s, 3);
    CHECK(f.n >= 1023 && f.n <= 1025);
    memset(&action, 0, sizeof action);
    CHECK_INT(llmcb_run_custom(f.run, "n", str("d")), LLMCB_EBUSY);
    CHECK_INT(llmcb_run_action(f.run, &action), LLMCB_EBUSY);
    CHECK_INT(llmcb_run_agent_finish(f.run, str("o"), str("l")),
              LLMCB_EBUSY);
    b = llmcb_task_start(w.s.loop, second_waiter, 0, &f);
    CHECK_INT(llmcb_op_wait(b), LLMCB_OK);
    CHECK_INT(f.second, LLMCB_EBUSY);
    llmcb_op_free(b);
    gate_let(&g, ALL);
    CHECK_INT(llmcb_op_wait(a), LLMCB_OK);
    CHECK_INT(s->told[LLMCB_TEXT], 3000);
    CHECK_INT(w.ears[1]->told[LLMCB_TEXT], 3000);
    llmcb_op_free(a);
    end_and_free(op, "");
    world_close(&w);
}

typedef struct opener {
    llmcb_loop *loop;
    gate *g;
} opener;

/* Opens a gate when the loop is fast asleep. */
static void *open_when_asleep(void *arg)
{
    opener *o = (opener *)arg;
    int i;

    for (i = 0; i < 200; i++) {
        llmcbi_lock(o->loop);
        if (!o->loop->sleeping) i = 0;
        llmcbi_unlock(o->loop);
        sched_yield();
    }
    gate_let(o->g, ALL);
    return NULL;
}

/* The worker that does the last event wakes it. */
TEST(awaiting_a_run_wakes_the_loop)
{
    world w;
    filler f;
    gate g = GATE;
    opener o;
    pthread_t thread;
    llmcb_config c;
    llmcb_op *op, *a;

    world_init(&w);
    w.s.ld.virtual_clock = false; /* one wakes the loop whenever all rests */
    world_ear(&w, "S", SYNC, 0)->gate = &g;
    w.ears[0]->gate_kind = LLMCB_TEXT;
    world_open(&w);
    c = world_config(&w);
    op = run_new(&w, LLMCB_RUN_CHAIN, "r", &c);
    while (!heard(w.ears[0], LLMCB_CHAIN_START)) turns(&w.s, 1);
    memset(&f, 0, sizeof f);
    f.run = llmcb_op_run(op);
    llmcb_run_text(f.run, str("1"));
    turn_to_gate(&w.s, &g, 1);
    llmcb_run_text(f.run, str("2"));
    a = llmcb_task_start(w.s.loop, second_waiter, 0, &f);
    o.loop = w.s.loop;
    o.g = &g;
    REQUIRE(pthread_create(&thread, NULL, open_when_asleep, &o) == 0);
    CHECK_INT(llmcb_op_wait(a), LLMCB_OK);
    CHECK_INT(f.second, LLMCB_OK);
    pthread_join(thread, NULL);
    llmcb_op_free(a);
    end_and_free(op, "");
    world_close(&w);
}

/* The run goes, or is cancelled, or the waiter is, under the waiter. */
TEST(awaiting_a_run_that_goes)
{
    int i;

    for (i = 0; i < 5; i++) {
        world w;
        filler f;
        gate g = GATE;
        llmcb_config c;
        llmcb_op *op, *a;
        ear *s;

        world_init(&w);
        s = world_ear(&w, "S", SYNC, 0);
        s->gate = &g;
        s->gate_kind = LLMCB_TEXT;
        world_open(&w);
        c = world_config(&w);
        op = run_new(&w, LLMCB_RUN_CHAIN, "r", &c);
        memset(&f, 0, sizeof f);
        f.run = llmcb_op_run(op);
        llmcb_run_text(f.run, str("1"));
        llmcb_run_text(f.run, str("2"));
        a = llmcb_task_start(w.s.loop, second_waiter, 0, &f);
        turn_to_gate(&w.s, &g, 1);
        if (i == 0) llmcb_op_cancel(op);
        if (i == 1) llmcb_op_free(op);
        if (i == 2 || i == 3) llmcb_op_cancel(a);
        turns(&w.s, 3);
        if (i == 2) CHECK(llmcb_op_done(a));
        if (i == 3) llmcb_run_end(f.run, str(""));
        gate_let(&g, ALL);
        if (i == 4) { /* the loop goes */
            world_close(&w);
            CHECK_INT(f.second, LLMCB_ECANCELLED);
            continue;
        }
        CHECK_INT(llmcb_op_wait(a), LLMCB_OK);
        CHECK_INT(f.second, i == 2 || i == 3 ? LLMCB_ECANCELLED : LLMCB_OK);
        llmcb_op_free(a);
        if (i == 2) llmcb_run_end(f.run, str(""));
        if (i != 1) llmcb_op_wait(op);
        if (i != 1) llmcb_op_free(op);
        world_close(&w);
    }
}

/* Parents that can have no children. */
TEST(odd_parents)
{
    world w, other;
    llmcb_config c;
    llmcb_op *op, *child, *call;
    int i;

    world_init(&w);
    world_init(&other);
    world_open(&w);
    world_open(&other);
    op = run_new(&other, LLMCB_RUN_CHAIN, "r", NULL);
    child = run_within(&w, op, LLMCB_RUN_CHAIN, "q");
    CHECK_INT(llmcb_op_code(child), LLMCB_EINVAL); /* of another loop */
    llmcb_op_free(child);
    end_and_free(op, "");
    call = chat_with(&w, NULL);
    c = llmcb_run_child(llmcb_op_run(call), NULL);
    CHECK(!c.parent);
    c = llmcb_run_child(NULL, NULL);
    CHECK(!c.parent);
    c.parent = llmcb_op_run(call);
    child = run_new(&w, LLMCB_RUN_CHAIN, "q", &c);
    CHECK_INT(llmcb_op_code(child), LLMCB_ESTATE);
    llmcb_op_free(child);
    CHECK_INT(llmcb_run_end(llmcb_op_run(call), str("")), LLMCB_ESTATE);
    CHECK_INT(llmcb_run_fail(llmcb_op_run(call), NULL), LLMCB_ESTATE);
    CHECK_INT(llmcb_op_wait(call), LLMCB_OK);
    CHECK_STR(llmcb_op_output(call)->text.ptr, "");
    CHECK_STR(llmcb_op_output(NULL)->text.ptr, "");
    llmcb_op_free(call);
    for (i = 0; i < 3; i++) { /* ended, cancelled, done */
        op = run_new(&w, LLMCB_RUN_CHAIN, "r", NULL);
        turns(&w.s, 2);
        c = llmcb_run_child(llmcb_op_run(op), NULL);
        if (i == 0) llmcb_run_end(llmcb_op_run(op), str(""));
        if (i == 1) llmcb_op_cancel(op);
        if (i == 1) turns(&w.s, 1);
        if (i == 2) llmcb_run_fail(llmcb_op_run(op), NULL);
        if (i == 2) CHECK_INT(llmcb_op_wait(op), LLMCB_EINVAL);
        child = run_new(&w, LLMCB_RUN_CHAIN, "q", &c);
        CHECK_INT(llmcb_op_code(child), LLMCB_ESTATE);
        CHECK(*llmcb_op_error(child)->message != '\0');
        llmcb_op_free(child);
        child = chat_with(&w, &c);
        CHECK_INT(llmcb_op_code(child), LLMCB_ESTATE);
        llmcb_op_free(child);
        llmcb_op_free(op);
    }
    CHECK(run_new(&w, (llmcb_run_kind)7, "r", NULL) == NULL ||
          LLMCBI_OWNER(llmcb_op, all, w.s.loop->ops)->error->code ==
              LLMCB_EINVAL);
    CHECK(llmcb_run_start(NULL, NULL, NULL) == NULL);
    op = llmcb_run_start(w.s.loop, NULL, NULL); /* a group without a name */
    end_and_free(op, "");
    world_close(&other);
    world_close(&w);
}

/* A call that could not be made has a run that never began. */
TEST(the_run_of_a_refused_call_is_no_parent)
{
    long i;
    bool failed = true;

    for (i = 1; failed && !test_failures_here; i++) {
        world w;
        llmcb_config c;
        llmcb_op *call, *child;

        world_init(&w);
        world_ear(&w, "I", INLINE, 0);
        world_ear(&w, "A", ASYNC, 0);
        world_open(&w);
        c = world_config(&w);
        w.s.heap.fail_at = w.s.heap.calls + i;
        call = chat_with(&w, &c);
        w.s.heap.fail_at = 0;
        failed = !call || llmcb_op_done(call);
        if (call && failed && llmcb_op_run_at(call, 0)) {
            memset(&c, 0, sizeof c);
            c.parent = llmcb_op_run_at(call, 0);
            child = run_new(&w, LLMCB_RUN_CHAIN, "q", &c);
            CHECK(llmcb_op_done(child));
            CHECK(llmcb_op_code(child) == LLMCB_ESTATE ||
                  llmcb_op_code(child) == LLMCB_EINVAL);
            if (llmcb_op_done(child)) llmcb_op_free(child);
        }
        if (call) llmcb_op_free(call);
        if (test_failures_here) return; /* it would crash */
        world_close(&w);
    }
    CHECK(i > 5);
}

/* ======== time ============================================================ */

static llmcb_step sleeper(llmcb_task *t)
{
    leaver *l = (leaver *)t->self;

    LLMCB_BEGIN(t);
    l->begun = true;
    if (l->step.name) llmcb_run_end(llmcb_task_run(t), str(l->step.name));
    LLMCB_AWAIT(t, llmcb_sleep(t, LLMCB_FOREVER));
    l->code = t->result;
    if (l->sleeps) { /* a cleanup that takes for ever */
        LLMCB_AWAIT(t, llmcb_sleep(t, LLMCB_FOREVER));
        l->code = t->result;
    }
    return l->code;
    LLMCB_END(t);
}

/* A body, a run without one, a call within it: all end in time. */
TEST(a_run_may_take_timeout_ms)
{
    int i;

    for (i = 0; i < 4; i++) {
        world w;
        leaver l;
        llmcb_run_desc d;
        llmcb_config c;
        llmcb_op *op, *child = NULL;

        world_init(&w);
        world_all_ears(&w);
        scene_tape(&w.s, OK_HEAD, "a|b|c", 1000, LLMCB_REPLAY_KEEP);
        scene_open(&w.s);
        memset(&l, 0, sizeof l);
        memset(&d, 0, sizeof d);
        d.name = "r";
        d.timeout_ms = 70;
        d.self = &l;
        if (i == 1 || i == 3) d.body = sleeper;
        if (i == 3) l.step.name = "said"; /* what it brings, not its end */
        c = world_config(&w);
        w.ears[1]->ms = 50; /* the start does not count */
        op = llmcb_run_start(w.s.loop, &d, &c);
        if (i == 2) child = chat_within(&w, llmcb_op_run(op), NULL);
        if (i == 2) llmcb_run_text(llmcb_op_run(op), str("t"));
        while (!heard(w.ears[0], LLMCB_CHAIN_START))
            llmcb_loop_run_once(w.s.loop, LLMCB_FOREVER);
        if (ends_in_time(&w, op)) CHECK_INT(llmcb_op_code(op),
                                            LLMCB_ETIMEDOUT);
        CHECK_INT(llmcb_op_error(op)->detail, LLMCB_DETAIL_TOTAL);
        CHECK(llmcb_op_run(op)->finished_ms >= 120);
        if (i == 1 || i == 3) CHECK_INT(l.code, LLMCB_ECANCELLED);
        if (child) CHECK_INT(llmcb_op_code(child), LLMCB_ECANCELLED);
        if (child) CHECK_INT(llmcb_op_error(child)->detail,
                             LLMCB_DETAIL_PARENT);
        llmcb_op_free(op);
        llmcb_op_free(child);
        world_close(&w);
        if (test_failures_here) {
            printf("  way %d\n", i);
            return;
        }
    }
}

static llmcb_step ends_at_once(llmcb_task *t)
{
    world *w = (world *)t->self;

    w->ears[1]->ms = 500;
    llmcb_run_text(llmcb_task_run(t), str("t"));
    return LLMCB_DONE;
}

/* It does not count handlers, if all that they wait for was in time. */
TEST(a_timeout_is_not_for_handlers)
{
    world w;
    llmcb_run_desc d;
    llmcb_config c;
    llmcb_op *op;

    world_init(&w);
    world_all_ears(&w);
    world_open(&w);
    memset(&d, 0, sizeof d);
    d.timeout_ms = 70;
    d.body = ends_at_once;
    d.self = &w;
    c = world_config(&w);
    op = llmcb_run_start(w.s.loop, &d, &c);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_INT(llmcb_loop_now(w.s.loop), 1000);
    llmcb_op_free(op);
    world_close(&w);
}

/* A second cancel ends a second await, as it does of a plain coroutine. */
TEST(a_second_cancel_goes_down_too)
{
    world w;
    leaver l;
    llmcb_config c;
    llmcb_op *root, *op;
    int i;

    world_init(&w);
    world_all_ears(&w);
    world_open(&w);
    memset(&l, 0, sizeof l);
    l.sleeps = true;
    c = world_config(&w);
    root = run_new(&w, LLMCB_RUN_CHAIN, "root", &c);
    c = llmcb_run_child(llmcb_op_run(root), NULL);
    op = run_body(&w, "op", sleeper, 0, &l, &c);
    while (!l.begun) llmcb_loop_run_once(w.s.loop, LLMCB_FOREVER);
    llmcb_op_cancel(root);
    turns(&w.s, 6);
    CHECK_INT(l.code, LLMCB_ECANCELLED);
    CHECK(!llmcb_op_done(op));
    l.code = LLMCB_OK;
    llmcb_op_cancel(root);
    for (i = 0; i < 20 && !llmcb_op_done(op); i++) turns(&w.s, 1);
    CHECK_INT(l.code, LLMCB_ECANCELLED);
    llmcb_op_free(root);
    llmcb_op_free(op);
    world_close(&w);
}

/* A handler that does not return in time is given up: in the start, in a text
 * and in the end, of a run with a child. */
TEST(handler_ms_of_a_run)
{
    static const llmcb_event_kind in[] = { LLMCB_CHAIN_START, LLMCB_TEXT,
                                           LLMCB_CHAIN_END };
    int i, freed;

    for (i = 0; i < 6; i++)
        for (freed = 0; freed < 2; freed++) {
            world w;
            gate g = GATE;
            leaver l;
            llmcb_run_desc d;
            llmcb_config c;
            llmcb_op *op, *child;
            ear *s;

            world_init(&w);
            w.impatient = true;
            w.s.ld.virtual_clock = false; /* which does not pass a worker */
            s = world_ear(&w, "S", i < 3 ? SYNC : ASYNC, 0);
            world_ear(&w, "A", ASYNC, 0);
            if (i < 3)
                s->gate = &g;
            else
                s->ms = 1000000;
            s->gate_kind = in[i % 3];
            world_open(&w);
            memset(&l, 0, sizeof l);
            memset(&d, 0, sizeof d);
            d.name = "r";
            d.handler_ms = 5;
            c = world_config(&w);
            op = llmcb_run_start(w.s.loop, &d, &c);
            c = llmcb_run_child(llmcb_op_run(op), NULL);
            c.n_callbacks = 0;
            child = run_body(&w, "op", sleeper, 0, &l, &c);
            llmcb_run_text(llmcb_op_run(op), str("t"));
            if (i == 2) {
                llmcb_op_cancel(child);
                llmcb_op_wait(child);
                llmcb_run_end(llmcb_op_run(op), str("x"));
            } else {
                turns(&w.s, 2);
                if (i % 3) llmcb_run_fail(llmcb_op_run(op), NULL);
            }
            llmcb_op_wait(op);
            CHECK(llmcb_op_code(op) == LLMCB_ETIMEDOUT ||
                  (i != 0 && i != 2 && llmcb_op_code(op) == LLMCB_EINVAL));
            CHECK(llmcb_op_done(child) && llmcb_op_code(child) != LLMCB_OK);
            if (freed) llmcb_op_free(op); /* S is in its memory */
            llmcb_op_free(child);
            gate_let(&g, ALL);
            if (!freed) llmcb_op_free(op);
            world_close(&w);
        }
}

static llmcb_step awaits_itself(llmcb_task *t)
{
    LLMCB_BEGIN(t);
    CHECK_INT(llmcb_run_text(llmcb_task_run(t), str("t")), LLMCB_OK);
    LLMCB_AWAIT(t, llmcb_await_run(t, llmcb_task_run(t)));
    return t->result;
    LLMCB_END(t);
}

/* The same while the body waits until all have been told what it said. */
TEST(handler_ms_of_a_run_that_awaits_itself)
{
    int sync;

    for (sync = 0; sync < 2; sync++) {
        world w;
        gate g = GATE;
        llmcb_run_desc d;
        llmcb_config c;
        llmcb_op *op;
        ear *slow;

        world_init(&w);
        w.partial = w.impatient = true;
        world_ear(&w, "I", INLINE, 0);
        slow = world_ear(&w, "slow", sync ? SYNC : ASYNC, 0);
        memset(&slow->h.sync, 0, sizeof slow->h.sync);
        memset(&slow->h.async, 0, sizeof slow->h.async);
        if (sync)
            slow->h.sync.on_text = ear_sync;
        else
            slow->h.async.on_text = ear_async;
        slow->gate = &g;
        slow->ms = 5000;
        world_open(&w);
        memset(&d, 0, sizeof d);
        d.body = awaits_itself;
        d.handler_ms = 20;
        c = world_config(&w);
        op = llmcb_run_start(w.s.loop, &d, &c);
        if (sync) { /* no clock passes a worker by itself */
            turn_to_gate(&w.s, &g, 1);
            llmcb_clock_advance(w.s.loop, 20);
            turns(&w.s, 20);
            CHECK(llmcb_op_done(op));
        }
        if (!llmcb_op_done(op)) gate_let(&g, ALL);
        CHECK_INT(llmcb_op_wait(op), LLMCB_ETIMEDOUT);
        CHECK_INT(llmcb_op_error(op)->detail, LLMCB_DETAIL_HANDLER);
        CHECK_INT(llmcb_loop_now(w.s.loop), 20);
        gate_let(&g, ALL);
        llmcb_op_free(op);
        world_close(&w);
    }
}

/* A takes 60 ms for what the body says and none for what comes later, B the
 * other way round, and much longer. */
static llmcb_step slow_of_texts(llmcb_task *t, llmcb_handler *h,
                                const llmcb_event *ev)
{
    ear *e = (ear *)(void *)h;
    bool late = *ev->data->text.ptr == 'l';

    LLMCB_BEGIN(t);
    ear_enter(e, ev);
    if (late == (*e->name == 'B')) LLMCB_AWAIT(t, llmcb_sleep(t, e->ms));
    return ear_leave(e, ev);
    LLMCB_END(t);
}

static llmcb_step says_and_awaits(llmcb_task *t)
{
    llmcb_run *run = llmcb_task_run(t);
    int i;

    LLMCB_BEGIN(t);
    for (i = 0; i < 4; i++) CHECK_INT(llmcb_run_text(run, str("x")), LLMCB_OK);
    LLMCB_AWAIT(t, llmcb_await_run(t, run));
    CHECK_INT(t->result, LLMCB_OK);
    CHECK_INT(llmcb_loop_now(llmcb_task_loop(t)), 240);
    LLMCB_AWAIT(t, llmcb_sleep(t, 600));
    return t->result;
    LLMCB_END(t);
}

/* ... but an event behind what it waits for is nobody's delay, however long a
 * handler takes for that. */
TEST(handler_ms_is_not_for_what_comes_behind_a_flush)
{
    world w;
    llmcb_run_desc d;
    llmcb_config c;
    llmcb_op *op;
    int i;

    world_init(&w);
    w.partial = true;
    for (i = 0; i < 2; i++) {
        ear *e = world_ear(&w, i ? "B" : "A", ASYNC, 0);
        memset(&e->h.async, 0, sizeof e->h.async);
        e->h.async.on_text = slow_of_texts;
        e->ms = i ? 400 : 60;
    }
    world_open(&w);
    memset(&d, 0, sizeof d);
    d.body = says_and_awaits;
    d.handler_ms = 150;
    c = world_config(&w);
    op = llmcb_run_start(w.s.loop, &d, &c);
    turns(&w.s, 2); /* it awaits */
    CHECK_INT(llmcb_run_text(llmcb_op_run(op), str("late")), LLMCB_OK);
    CHECK_INT(llmcb_op_wait(op), LLMCB_OK);
    CHECK_INT(llmcb_loop_now(w.s.loop), 840);
    for (i = 0; i < 2; i++) CHECK_INT(heard(w.ears[i], LLMCB_TEXT), 5);
    llmcb_op_free(op);
    world_close(&w);
}

/* A sync handler that is busy is told of who waits in the order in which they
 * began: those of one turn, those of several, and while for each that goes
 * another comes, so that there is never none. */
TEST(starts_wait_for_a_busy_handler_in_order)
{
    enum { ONE_TURN, SEVERAL_TURNS, ONE_FOR_ONE, N_WAYS, N = 20 };
    int way;

    for (way = 0; way < N_WAYS; way++) {
        world w;
        gate g = GATE;
        llmcb_config c;
        llmcb_op *ops[N];
        char name[8], want[N * 8] = "";
        ear *s;
        int i;

        world_init(&w);
        w.partial = true;
        s = world_ear(&w, "S", SYNC, 0);
        memset(&s->h.sync, 0, sizeof s->h.sync);
        s->h.sync.on_chain_start = ear_sync;
        s->gate = &g;
        world_open(&w);
        c = world_config(&w);
        for (i = 0; i < N; i++) {
            sprintf(name, "r%d", i + 1);
            sprintf(want + strlen(want), "%s+%s", i ? " " : "", name);
            ops[i] = run_new(&w, LLMCB_RUN_CHAIN, name, &c);
            if (i == 0) turn_to_gate(&w.s, &g, 1);
            if (way != ONE_TURN) turns(&w.s, 2);
            if (way == ONE_FOR_ONE && i > 1) {
                gate_let(&g, 1);
                turn_to_gate(&w.s, &g, (unsigned)i);
            }
        }
        gate_let(&g, ALL);
        for (i = 0; i < N; i++) end_and_free(ops[i], "x");
        CHECK_STR(s->log, want);
        world_close(&w);
    }
}

/* A loop that is freed in every state of a tree, with a handler that does not
 * return. In a child: what the thread uses is leaked, as documented. */
static const struct {
    llmcb_event_kind kind;
    enum { LEFT, ENDED, CANCELLED } act;
} stuck_in[] = { { LLMCB_CHAIN_START, LEFT },  { LLMCB_TEXT, LEFT },
                 { LLMCB_TEXT, ENDED },        { LLMCB_TEXT, CANCELLED },
                 { LLMCB_CHAIN_END, ENDED },   { LLMCB_CHAIN_ERROR, CANCELLED },
                 { LLMCB_TOOL_START, LEFT },   { LLMCB_TOOL_ERROR, CANCELLED },
                 { LLMCB_CHAT_MODEL_START, LEFT } };

static int stuck_child(size_t at)
{
    static world w;
    static gate g = GATE;
    llmcb_config c;
    llmcb_loop *loop;
    llmcb_op *root, *op;
    ear *s, *a;
    bool out = false;
    int bits = 0;

    world_init(&w);
    w.partial = w.impatient = true; /* the stuck one sees no finish */
    w.s.ld.shutdown_ms = 60;
    w.s.ld.virtual_clock = false;
    s = world_ear(&w, "S", SYNC, 0);
    a = world_ear(&w, "A", ASYNC, 0);
    s->gate = &g;
    s->gate_kind = (int)stuck_in[at].kind;
    world_open(&w);
    loop = w.s.loop;
    c = world_config(&w);
    root = run_new(&w, LLMCB_RUN_CHAIN, "root", &c);
    op = run_within(&w, root, LLMCB_RUN_TOOL, "op");
    chat_within(&w, llmcb_op_run(op), NULL);
    if (stuck_in[at].act == CANCELLED)
        while (!heard(s, LLMCB_TOOL_START) && s->gate_kind != LLMCB_TEXT)
            llmcb_loop_run_once(loop, 1);
    llmcb_run_text(llmcb_op_run(root), str("t"));
    if (stuck_in[at].act == ENDED) llmcb_run_end(llmcb_op_run(root), str(""));
    if (stuck_in[at].act == CANCELLED && s->gate_kind != LLMCB_TEXT)
        llmcb_op_cancel(root);
    while (gate_came(&g) < 1) llmcb_loop_run_once(loop, 1);
    if (stuck_in[at].act == CANCELLED) llmcb_op_cancel(root);
    llmcb_chat_free(w.s.chat);
    if (llmcb_loop_free(loop) != LLMCB_ETIMEDOUT) bits |= 1;
    /* the other one is told what can be told without S */
    if (s->gate_kind == LLMCB_TOOL_ERROR && !heard(a, LLMCB_TOOL_ERROR))
        bits |= 2;
    if (s->gate_kind == LLMCB_CHAIN_ERROR && !heard(a, LLMCB_CHAIN_ERROR))
        bits |= 4;
    if (w.wrong) bits |= 8;
    gate_let(&g, ALL); /* now it returns, and touches nothing that is gone */
    while (!out) {
        llmcbi_lock(loop);
        out = loop->pool->n_exited == loop->pool->n_threads;
        llmcbi_unlock(loop);
        if (!out) sched_yield();
    }
    return bits;
}

TEST(freeing_the_loop_with_a_stuck_handler)
{
    size_t i;

    for (i = 0; i < sizeof stuck_in / sizeof *stuck_in; i++) {
        int status = 0;
        pid_t pid = fork();

        REQUIRE(pid >= 0);
        if (pid == 0) {
            alarm(30);
            test_exit(stuck_child(i));
        }
        REQUIRE(waitpid(pid, &status, 0) == pid);
        if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
            TEST_FAIL("case %u: status %#x", (unsigned)i, (unsigned)status);
    }
}

/* ======== hooks and handlers that change what they hang on ================ */

static int act_rehook(ear *e, const llmcb_event *ev)
{
    world *w = e->w;

    (void)ev;
    if (e->events % 2)
        llmcb_loop_unhook(w->s.loop, w->list[1]);
    else
        CHECK_INT(llmcb_loop_hook(w->s.loop, w->list[1]), LLMCB_OK);
    llmcb_loop_unhook(w->s.loop, &e->h); /* itself, too */
    return 0;
}

TEST(case_026_hooks_changed_inside_handlers)
{
    world w;
    llmcb_op *a, *b;

    world_init(&w);
    world_ear(&w, "I", INLINE, 0)->act = act_rehook;
    world_ear(&w, "H", ASYNC, 0);
    world_open(&w);
    llmcb_loop_hook(w.s.loop, w.list[0]);
    llmcb_loop_hook(w.s.loop, w.list[1]);
    a = run_new(&w, LLMCB_RUN_CHAIN, "a", NULL);
    turns(&w.s, 2); /* both are out now, but not of a */
    CHECK_INT(w.s.loop->n_hooks, 0);
    b = run_new(&w, LLMCB_RUN_CHAIN, "b", NULL);
    end_and_free(b, "");
    CHECK_STR(w.ears[0]->log, "+a");
    end_and_free(a, ""); /* the even event puts H back */
    CHECK_STR(w.ears[0]->log, "+a -a");
    CHECK_STR(w.ears[1]->log, "+a -a");
    CHECK_INT(w.s.loop->n_hooks, 1);
    b = run_new(&w, LLMCB_RUN_CHAIN, "b", NULL);
    end_and_free(b, "");
    CHECK_STR(w.ears[1]->log, "+a -a +b -b");
    world_close(&w);
}

/* Starts a child from every event of its parent, as far as it may. */
static int act_breed(ear *e, const llmcb_event *ev)
{
    llmcb_config c;
    llmcb_op *op;

    if (strcmp(ev->run->name, "root") != 0) return 0;
    c = llmcb_run_child(ev->run, NULL);
    op = run_new(e->w, LLMCB_RUN_CHAIN, "child", &c);
    if (ends(ev->kind) || fails(ev->kind))
        CHECK_INT(llmcb_op_code(op), LLMCB_ESTATE);
    if (llmcb_op_run(op))
        CHECK_INT(llmcb_run_end(llmcb_op_run(op), str("")), LLMCB_OK);
    llmcb_op_free(op); /* cancelled, though it ended: nobody waits for it */
    return 0;
}

TEST(handlers_that_start_children)
{
    mode m;

    for (m = ASYNC; m <= INLINE; m++) {
        world w;
        llmcb_config c;
        llmcb_op *op;
        size_t i;

        world_init(&w);
        world_all_ears(&w);
        w.ears[m == ASYNC ? 1 : 2]->act = act_breed;
        world_open(&w);
        c = world_config(&w);
        op = run_new(&w, LLMCB_RUN_CHAIN, "root", &c);
        for (i = 0; i < 3; i++) llmcb_run_text(llmcb_op_run(op), str("t"));
        while (heard(w.ears[0], LLMCB_TEXT) < 3)
            llmcb_loop_run_once(w.s.loop, LLMCB_FOREVER);
        end_and_free(op, "");
        world_close(&w);
    }
}

/* ======== no memory ======================================================= */

/* false: nothing failed. */
static bool tree_without_memory(long at, bool for_ever)
{
    world w;
    tree x;
    llmcb_config c;
    llmcb_error e;
    llmcb_document found[2];
    llmcb_pair page = { "page", "7" };
    llmcb_op *op;
    size_t i;
    bool failed;

    world_init(&w);
    for (i = 0; i < 3; i++) {
        static const mode m[] = { SYNC, ASYNC, INLINE };
        world_ear(&w, i == 0 ? "S" : i == 1 ? "A" : "I", m[i], 0);
    }
    memset(&x, 0, sizeof x);
    memset(&e, 0, sizeof e);
    memset(found, 0, sizeof found);
    e.code = LLMCB_EPROTO;
    w.s.heap.fail_at = at;
    w.s.heap.for_ever = for_ever;
    x.w = &w;
    if (world_open(&w)) {
        llmcb_loop_hook(w.s.loop, w.list[0]);
        c = world_config(&w);
        x.root = run_body(&w, "root", tree_root, 0, &x, &c);
        llmcb_op_wait(x.root);
        read_str(llmcb_op_output(x.root)->text);
        read_str(llmcb_op_output(x.child)->text);
        CHECK(!x.root || llmcb_op_code(x.root) == LLMCB_OK ||
              llmcb_op_code(x.root) == LLMCB_ENOMEM ||
              llmcb_op_code(x.root) == LLMCB_ESYS);
        llmcb_op_free(x.root);
        llmcb_op_free(x.child);
        llmcb_op_free(x.left);
        llmcb_op_free(x.call);
        op = run_new(&w, LLMCB_RUN_RETRIEVER, "r", &c);
        found[0].content = found[1].id = str("a long text, for an arena of "
                                             "its own that is larger than "
                                             "others of the same");
        found[0].metadata = &page;
        found[0].n_metadata = 1;
        llmcb_run_custom(llmcb_op_run(op), "n", str("d"));
        llmcb_run_action(llmcb_op_run(op), &(llmcb_action){ .log = str("l") });
        llmcb_run_agent_finish(llmcb_op_run(op), str("o"), str("l"));
        for (i = 0; i < 2 && op && !llmcb_op_done(op); i++)
            if (llmcb_run_end_documents(llmcb_op_run(op), found, 2) ==
                LLMCB_OK)
                break;
        llmcb_op_wait(op);
        if (op && llmcb_op_output(op)->n_documents) {
            read_str(llmcb_op_output(op)->documents[1].id);
            read_str(str(llmcb_op_output(op)->documents[0].metadata->value));
        }
        llmcb_op_free(op);
        op = run_new(&w, LLMCB_RUN_CHAIN, "f", &c);
        llmcb_run_fail(llmcb_op_run(op), &e);
        llmcb_op_wait(op);
        CHECK(!op || llmcb_op_code(op) == LLMCB_EPROTO ||
              llmcb_op_code(op) == LLMCB_ENOMEM ||
              llmcb_op_code(op) == LLMCB_ESYS);
        llmcb_op_free(op);
        op = run_new(&w, LLMCB_RUN_CHAIN, "l", &c);
        if (op && !llmcb_op_done(op)) {
            static char large[4000];
            memset(large, 'x', sizeof large - 1);
            llmcb_run_end(llmcb_op_run(op), str(large));
            llmcb_op_wait(op);
            read_str(llmcb_op_output(op)->text);
        }
        llmcb_op_free(op);
    }
    failed = w.s.heap.calls >= at;
    w.s.heap.fail_at = 0;
    world_close(&w);
    if (test_failures_here) printf("  allocation %ld\n", at);
    return failed && !test_failures_here;
}

TEST(a_tree_without_memory)
{
    long at;
    int for_ever;

    for (for_ever = 0; for_ever < 2; for_ever++) {
        for (at = 1; tree_without_memory(at, for_ever);) at++;
        CHECK(at > 50 || test_failures_here); /* 60 with 32 bits */
    }
}

/* ======== everything at once ============================================== */

/* Trees whose bodies and handlers start, end, fail, cancel and free what they
 * find, in an order that only the seed decides. */
#define MAX_OPS 24
typedef struct wood {
    world w;
    uint32_t seed, state;
    llmcb_op *ops[MAX_OPS]; /* of runs and calls; NULL: freed */
    size_t n_ops;
    bool quiet; /* from now on nothing new is begun */
} wood;

static uint32_t wood_mix(uint32_t x)
{
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x *= 0x846CA68Bu;
    return x ^ x >> 16;
}

/* Loop thread only: what workers do is decided by their event. */
static uint32_t wood_below(wood *d, uint32_t n)
{
    d->state = wood_mix(d->state + 0x9E3779B9u);
    return d->state % n;
}

static llmcb_step wood_body(llmcb_task *t);

/* A run or a call, within `parent` or on its own. */
static void wood_plant(wood *d, llmcb_run *parent)
{
    world *w = &d->w;
    llmcb_config c = world_config(w);
    llmcb_run_desc r;
    llmcb_op *op;

    if (d->quiet || d->n_ops == MAX_OPS) return;
    if (parent) c = llmcb_run_child(parent, wood_below(d, 2) ? "s" : NULL);
    if (!wood_below(d, 4)) c.n_local_callbacks = 0;
    memset(&r, 0, sizeof r);
    r.kind = (llmcb_run_kind)wood_below(d, 3);
    r.input = str("in");
    if (!wood_below(d, 8)) r.timeout_ms = 1 + wood_below(d, 60);
    if (w->impatient && !wood_below(d, 3)) r.handler_ms = 3;
    if (wood_below(d, 3)) {
        r.body = wood_body;
        r.self = d;
        r.frame_size = sizeof(int);
    }
    if (!wood_below(d, 4))
        op = chat_with(w, &c);
    else
        op = llmcb_run_start(w->s.loop, &r, &c);
    if (op) d->ops[d->n_ops++] = op;
}

static void wood_act(wood *d, llmcb_run *run)
{
    size_t i = wood_below(d, (uint32_t)d->n_ops + 1);
    llmcb_op *op = i < d->n_ops ? d->ops[i] : NULL;
    llmcb_run *other = llmcb_op_run(op);
    llmcb_action action;
    llmcb_error e;

    memset(&e, 0, sizeof e);
    memset(&action, 0, sizeof action);
    e.code = LLMCB_EPROTO;
    switch (wood_below(d, 18)) {
    case 0:
    case 1:
    case 2: wood_plant(d, run); break;
    case 3: wood_plant(d, other); break;
    case 4: wood_plant(d, NULL); break;
    case 5: llmcb_run_end(run, str("e")); break;
    case 6:
    case 7: llmcb_run_end(other, str("e")); break;
    case 8: llmcb_run_fail(other, &e); break;
    case 9: llmcb_op_cancel(op); break;
    case 10:
        if (i < d->n_ops) free_op(&d->ops[i]);
        break;
    case 11: llmcb_run_text(run, str("t")); break;
    case 12: llmcb_run_custom(other, "n", str("d")); break;
    case 13: llmcb_run_action(other, &action); break;
    case 14: llmcb_run_agent_finish(run, str("o"), str("l")); break;
    case 15: llmcb_run_end_documents(other, NULL, 0); break;
    case 16: llmcb_loop_hook(d->w.s.loop, d->w.list[0]); break;
    default: llmcb_loop_unhook(d->w.s.loop, d->w.list[0]);
    }
}

static llmcb_step wood_body(llmcb_task *t)
{
    wood *d = (wood *)t->self;
    int *steps = (int *)t->frame;
    llmcb_run *run = llmcb_task_run(t);
    size_t i;

    CHECK(run != NULL);
    if (t->at && t->result == LLMCB_ECANCELLED && wood_below(d, 4))
        return t->result;
    t->at = 1;
    if (++*steps > 6) return LLMCB_DONE;
    wood_act(d, run);
    wood_act(d, run);
    i = wood_below(d, (uint32_t)d->n_ops);
    switch (wood_below(d, 8)) {
    case 0: return LLMCB_DONE;
    case 1: return LLMCB_EIO;
    case 2: return llmcb_await_run(t, run);
    case 3: return llmcb_await_any(t, &d->ops[i], 1, 20);
    case 4: return llmcb_await_all(t, d->ops, d->n_ops, 30);
    case 5: return llmcb_await_run(t, llmcb_op_run(d->ops[i]));
    default: return llmcb_sleep(t, wood_below(d, 9));
    }
}

static int act_wood(ear *e, const llmcb_event *ev)
{
    wood *d = (wood *)e->user;
    uint32_t dice = wood_mix(d->seed + (uint32_t)ev->seq * 977 +
                             (uint32_t)(unsigned char)*e->name * 31 +
                             (uint32_t)ev->kind * 7);

    if (dice % 32 == 0) return -7;
    if (dice % 8 == 1 && ev->kind != LLMCB_TEXT)
        llmcb_run_text(ev->run, str("h"));
    if (dice % 4 == 2 && pthread_equal(pthread_self(), d->w.loop_thread))
        wood_act(d, ev->run);
    return 0;
}

static void wood_grow(uint32_t seed)
{
    static const char *const names[] = { "a", "b", "c", "d", "e" };
    wood *d = (wood *)calloc(1, sizeof *d);
    world *w = &d->w;
    size_t i, n;
    uint32_t steps, end;

    if (!d) abort();
    d->seed = d->state = seed;
    world_init(w);
    w->impatient = !wood_below(d, 6);
    w->s.ld.virtual_clock = true;
    w->s.ld.workers = 2 + wood_below(d, 3);
    if (!wood_below(d, 3)) w->s.cd.limits.window_events = 1 + wood_below(d, 4);
    n = 1 + wood_below(d, 5);
    for (i = 0; i < n; i++) {
        ear *e = world_ear(w, names[i], (mode)wood_below(d, N_MODES), 0);
        if (!wood_below(d, 3)) e->h.flags |= LLMCB_AWAIT_EACH;
        if (!wood_below(d, 3)) e->h.flags |= LLMCB_PARALLEL;
        if (!wood_below(d, 4)) e->h.flags |= LLMCB_RAISE;
        e->ms = wood_below(d, 2) * wood_below(d, 12);
        e->act = wood_below(d, 4) ? act_wood : NULL;
        e->user = d;
    }
    scene_tape(&w->s, RETRY_HEAD, "", 0, LLMCB_REPLAY_KEEP);
    scene_tape(&w->s, BAD_HEAD, "", 0, LLMCB_REPLAY_CLOSE);
    scene_tape(&w->s, OK_HEAD, "a|b|c", 3, LLMCB_REPLAY_RESET);
    scene_tape(&w->s, OK_HEAD, "a|b|c|d|e" DONE, 4, LLMCB_REPLAY_KEEP);
    if (!wood_below(d, 4)) {
        w->s.heap.fail_at = 30 + wood_below(d, 300);
        w->s.heap.for_ever = wood_below(d, 2);
    }
    if (!scene_open(&w->s)) d->quiet = true;
    if (!d->quiet)
        for (steps = 5 + wood_below(d, 60); steps; steps--) {
            size_t k = wood_below(d, (uint32_t)d->n_ops + 1);
            if (!wood_below(d, 3))
                wood_act(d, k < d->n_ops ? llmcb_op_run(d->ops[k]) : NULL);
            else
                turns(&w->s, 1);
        }
    d->quiet = true;
    end = wood_below(d, 3);
    if (w->s.loop && end == 0) { /* all is freed under way */
        for (i = 0; i < d->n_ops; i++) free_op(&d->ops[i]);
        CHECK_INT(llmcb_loop_run(w->s.loop), LLMCB_OK);
    } else if (w->s.loop && end == 1) { /* all that is open is ended */
        while (llmcb_loop_alive(w->s.loop)) {
            for (i = 0; i < d->n_ops; i++)
                llmcb_run_end(llmcb_op_run(d->ops[i]), str("end"));
            llmcb_loop_run_once(w->s.loop, 5);
        }
        for (i = 0; i < d->n_ops; i++) CHECK(llmcb_op_done(d->ops[i]));
    } /* else the loop is freed */
    world_close(w);
    free(d);
    if (test_failures_here) printf("  seed %u\n", (unsigned)seed);
}

/* TEST_SEED=n plays one seed, TEST_SEEDS=n as many as that. */
TEST(trees_of_every_kind)
{
    const char *one = getenv("TEST_SEED"), *many = getenv("TEST_SEEDS");
    uint32_t seed = one ? (uint32_t)strtoul(one, NULL, 10) : 1;
    uint32_t last = one    ? seed
                    : many ? (uint32_t)strtoul(many, NULL, 10)
                           : 300;

    for (; seed <= last && !test_failures_here; seed++) wood_grow(seed);
}

int main(int argc, char **argv)
{
    return scene_main(argc, argv);
}

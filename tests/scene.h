/* The scene that test_call.c, test_run.c and others play in: a loop with a
 * counting heap and a virtual clock, a chat, recorded or hand-fed answers, and
 * handlers that write down what they are told. What must be slow waits at a
 * gate, nothing sleeps. Functions are inline, so that a program which leaves
 * some of them out gets no warning. */
#ifndef SCENE_H
#define SCENE_H

#if !defined(TEST_LINKED) && !defined(LLMCB_IMPLEMENTATION) && \
    !defined(LLMCB_NO_CURL)
#define LLMCB_NO_CURL
#endif
#include "impl.h"
#include "test.h"
#include <stdarg.h>

/* ---- gates: where a sync function waits until the test lets it go on ---- */

typedef struct gate {
    pthread_mutex_t m;
    pthread_cond_t c;
    unsigned came, passed, may;
} gate;

#define GATE { PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0, 0, 0 }
#define ALL 1000000u

static inline void gate_pass(gate *g)
{
    pthread_mutex_lock(&g->m);
    g->came++;
    pthread_cond_broadcast(&g->c);
    while (g->passed >= g->may) pthread_cond_wait(&g->c, &g->m);
    g->passed++;
    pthread_mutex_unlock(&g->m);
}

static inline void gate_let(gate *g, unsigned n)
{
    pthread_mutex_lock(&g->m);
    g->may += n;
    pthread_cond_broadcast(&g->c);
    pthread_mutex_unlock(&g->m);
}

static inline unsigned gate_came(gate *g)
{
    unsigned n;

    pthread_mutex_lock(&g->m);
    n = g->came;
    pthread_mutex_unlock(&g->m);
    return n;
}

/* Waits for the n-th arrival; the loop stands still meanwhile. */
static inline void gate_wait(gate *g, unsigned n)
{
    pthread_mutex_lock(&g->m);
    while (g->came < n) pthread_cond_wait(&g->c, &g->m);
    pthread_mutex_unlock(&g->m);
}

/* ---- the heap: counts, fails on demand, finds leaks and wrong sizes ------ */

typedef struct heap {
    pthread_mutex_t m;
    size_t blocks, bytes, peak;
    long calls;   /* that ask for memory */
    long fail_at; /* the first that fails, from 1; 0: none */
    bool for_ever; /* and all after it */
    bool wrong;   /* an old_size was not what had been asked for */
} heap;

#define HEAP_HEAD 16

static inline void *heap_resize(void *user, void *ptr, size_t old, size_t size)
{
    heap *h = (heap *)user;
    char *base = ptr ? (char *)ptr - HEAP_HEAD : NULL, *fresh = NULL;
    size_t had = 0;
    bool fail;

    if (base) memcpy(&had, base, sizeof had);
    pthread_mutex_lock(&h->m);
    if (had != old) h->wrong = true;
    fail = size && ++h->calls >= h->fail_at && h->fail_at &&
           (h->for_ever || h->calls == h->fail_at);
    if (!fail) {
        h->bytes += size - had;
        if (h->bytes > h->peak) h->peak = h->bytes;
        h->blocks += (size ? 1 : 0) - (ptr ? 1 : 0);
    }
    pthread_mutex_unlock(&h->m);
    if (fail) return NULL;
    if (size) {
        fresh = (char *)malloc(size + HEAP_HEAD);
        if (!fresh) abort();
        memcpy(fresh, &size, sizeof size);
        if (base)
            memcpy(fresh + HEAP_HEAD, ptr, had < size ? had : size);
    }
    if (base) { /* what is used after this shows, even without ASan */
        memset(base, 0xDD, had + HEAP_HEAD);
        free(base);
    }
    return fresh ? fresh + HEAP_HEAD : NULL;
}

/* There is memory again; whether allocation `at` had been reached. A job may
 * still be at it. */
static inline bool heap_mend(heap *h, long at)
{
    bool reached;

    pthread_mutex_lock(&h->m);
    reached = h->calls >= at;
    h->fail_at = 0;
    pthread_mutex_unlock(&h->m);
    return reached;
}

/* ---- the trace: what happened in what order, over all handlers ----------- */

static pthread_mutex_t trace_lock = PTHREAD_MUTEX_INITIALIZER;
static char trace[65536];
static size_t trace_len;

static inline void note(const char *format, ...)
{
    va_list ap;

    pthread_mutex_lock(&trace_lock);
    va_start(ap, format);
    if (trace_len && trace_len < sizeof trace - 1) trace[trace_len++] = ' ';
    trace_len += (size_t)vsnprintf(trace + trace_len,
                                   sizeof trace - trace_len, format, ap);
    va_end(ap);
    if (trace_len > sizeof trace - 300) trace_len = sizeof trace - 300;
    trace[trace_len] = '\0';
    pthread_mutex_unlock(&trace_lock);
}

/* Whether both stand in the trace, and `a` before `b`. */
static inline bool before(const char *a, const char *b)
{
    const char *x = strstr(trace, a), *y = strstr(trace, b);

    return x && y && x < y;
}

static inline size_t count_of(const char *in, const char *what)
{
    size_t n = 0;

    for (; (in = strstr(in, what)); in += strlen(what)) n++;
    return n;
}

/* ---- recording handlers -------------------------------------------------- */

typedef enum mode {
    SYNC,
    ASYNC,
    INLINE,
    SYNC_TOKENS, /* a mixed table: all but the tokens are async */
    ASYNC_TOKENS, /* a mixed table: all but the tokens are sync */
    INLINE_TOKENS, /* a mixed table: all but the tokens are async */
    N_MODES
} mode;

typedef struct rec_run {
    char id[37];
    uint64_t seq;
    bool inside, finished;
} rec_run;

/* Writes what it is told into `log`, one word an event, with | between:
 * start, the token's text, end, error:CODE-SKIPPED, text:..., ... */
typedef struct rec {
    llmcb_handler h; /* first */
    const char *name;
    int64_t ms; /* what an async event takes */
    /* Called inside every event, in async ones after the wait; its result is
     * the function's. */
    int (*act)(struct rec *r, const llmcb_event *ev);
    gate *gate;      /* sync functions wait here ... */
    int gate_kind;   /* ... in this event, or -1: in all */
    void *user;
    /* What it has seen. */
    pthread_mutex_t m;
    char log[32768];
    size_t len;
    unsigned inside, peak, starts, finishes, cancelled;
    unsigned events, done; /* that it has begun, and is done with */
    uint64_t skipped;
    rec_run runs[32];
    size_t n_runs;
    const char *wrong; /* a guarantee that was broken */
} rec;

static inline bool is_start(llmcb_event_kind k)
{
    return k == LLMCB_CHAT_MODEL_START || k == LLMCB_LLM_START;
}

static inline bool is_finish(llmcb_event_kind k)
{
    return k == LLMCB_LLM_END || k == LLMCB_LLM_ERROR;
}

/* The event in one word, controls as \xNN. Reads the whole payload, so that one that was freed
 * too early is found. */
static inline void event_word(char *out, size_t cap, const llmcb_event *ev)
{
    size_t i, n;

    switch (ev->kind) {
    case LLMCB_CHAT_MODEL_START:
        snprintf(out, cap, "start");
        break;
    case LLMCB_LLM_START:
        snprintf(out, cap, "llm(%s)", ev->start->prompt.ptr);
        break;
    case LLMCB_LLM_NEW_TOKEN:
        for (i = n = 0; i < ev->token->text.len && n + 5 < cap; i++) {
            unsigned char c = (unsigned char)ev->token->text.ptr[i];
            if (c < 0x20) n += (size_t)sprintf(out + n, "\\x%02x", c);
            else out[n++] = (char)c;
        }
        out[n] = '\0';
        break;
    case LLMCB_LLM_END:
        snprintf(out, cap, "end");
        break;
    case LLMCB_LLM_ERROR:
        if (ev->skipped)
            snprintf(out, cap, "error:%s-%u",
                     llmcb_code_name(ev->error->code) + 6,
                     (unsigned)ev->skipped);
        else
            snprintf(out, cap, "error:%s",
                     llmcb_code_name(ev->error->code) + 6);
        break;
    case LLMCB_RETRY:
        snprintf(out, cap, "retry:%d", ev->retry->attempt);
        break;
    case LLMCB_TEXT:
        snprintf(out, cap, "text:%s", ev->data->text.ptr);
        break;
    case LLMCB_CUSTOM_EVENT:
        snprintf(out, cap, "custom:%s=%s", ev->data->name.ptr,
                 ev->data->text.ptr);
        break;
    default:
        snprintf(out, cap, "?%d", ev->kind);
    }
}

static inline rec_run *rec_run_of(rec *r, const llmcb_event *ev)
{
    size_t i;

    for (i = 0; i < r->n_runs; i++)
        if (strcmp(r->runs[i].id, ev->run->id) == 0) return &r->runs[i];
    if (r->n_runs == sizeof r->runs / sizeof *r->runs) return NULL;
    strcpy(r->runs[r->n_runs].id, ev->run->id);
    return &r->runs[r->n_runs++];
}

/* Guarantee 1, checked in every event of every test. */
static inline const char *rec_check(const rec *r, rec_run *run,
                                    const llmcb_event *ev)
{
    (void)r;
    if (!run) return "too many runs";
    if (run->inside) return "two events of a run at once";
    if (run->finished) return "an event after the finish";
    if (ev->seq <= run->seq) return "out of order";
    if (is_start(ev->kind) != (ev->seq == 1)) return "a start in between";
    if (!ev->start != !is_start(ev->kind)) return "start payload";
    if (!ev->token != (ev->kind != LLMCB_LLM_NEW_TOKEN))
        return "token payload";
    if (!ev->error != (ev->kind != LLMCB_LLM_ERROR)) return "error payload";
    if (!ev->result != !is_finish(ev->kind)) return "result payload";
    if (!ev->retry != (ev->kind != LLMCB_RETRY)) return "retry payload";
    return NULL;
}

static inline void rec_enter(rec *r, const llmcb_event *ev)
{
    char word[256];
    const char *wrong;
    rec_run *run;

    event_word(word, sizeof word, ev);
    pthread_mutex_lock(&r->m);
    run = rec_run_of(r, ev);
    wrong = rec_check(r, run, ev);
    if (wrong && !r->wrong) r->wrong = wrong;
    if (run) {
        run->inside = true;
        run->seq = ev->seq;
        run->finished = is_finish(ev->kind);
    }
    r->events++;
    if (++r->inside > r->peak) r->peak = r->inside;
    r->starts += is_start(ev->kind);
    r->finishes += is_finish(ev->kind);
    r->skipped += ev->skipped;
    if (r->len < sizeof r->log - sizeof word)
        r->len += (size_t)sprintf(r->log + r->len, "%s%s",
                                  ev->seq > 1 || r->len ? "|" : "", word);
    pthread_mutex_unlock(&r->m);
    note("%s<%s", r->name, word);
}

static inline int rec_leave(rec *r, const llmcb_event *ev)
{
    char word[256];
    rec_run *run;
    int result = r->act ? r->act(r, ev) : 0;

    event_word(word, sizeof word, ev); /* the payload is still there */
    note("%s>%s", r->name, word);
    pthread_mutex_lock(&r->m);
    run = rec_run_of(r, ev);
    if (run) run->inside = false;
    r->inside--;
    r->done++;
    pthread_mutex_unlock(&r->m);
    return result;
}

static inline int rec_sync(llmcb_handler *h, const llmcb_event *ev)
{
    rec *r = (rec *)(void *)h;

    rec_enter(r, ev);
    if (r->gate && (r->gate_kind < 0 || r->gate_kind == (int)ev->kind))
        gate_pass(r->gate);
    return rec_leave(r, ev);
}

static inline llmcb_step rec_async(llmcb_task *t, llmcb_handler *h,
                                   const llmcb_event *ev)
{
    rec *r = (rec *)(void *)h;

    LLMCB_BEGIN(t);
    rec_enter(r, ev);
    if (r->ms) {
        LLMCB_AWAIT(t, llmcb_sleep(t, r->ms));
        if (t->result == LLMCB_ECANCELLED) r->cancelled++;
    }
    return rec_leave(r, ev);
    LLMCB_END(t);
}

/* Zeroed before, or static. */
static inline llmcb_handler *rec_init(rec *r, const char *name, mode m)
{
    bool others = m == ASYNC || m == SYNC_TOKENS || m == INLINE_TOKENS;

    pthread_mutex_init(&r->m, NULL);
    r->name = r->h.name = name;
    r->gate_kind = -1;
    if (m == INLINE || m == INLINE_TOKENS) r->h.flags = LLMCB_INLINE;
    if (m == ASYNC || m == ASYNC_TOKENS)
        r->h.async.on_llm_new_token = rec_async;
    else
        r->h.sync.on_llm_new_token = rec_sync;
    if (others) {
        r->h.async.on_chat_model_start = r->h.async.on_llm_end = rec_async;
        r->h.async.on_llm_error = r->h.async.on_text = rec_async;
        r->h.async.on_retry = r->h.async.on_custom_event = rec_async;
    } else {
        r->h.sync.on_chat_model_start = r->h.sync.on_llm_end = rec_sync;
        r->h.sync.on_llm_error = r->h.sync.on_text = rec_sync;
        r->h.sync.on_retry = r->h.sync.on_custom_event = rec_sync;
    }
    return &r->h;
}

/* The names of recorders in all modes. */
static const char *const mode_names[] = { "S", "A", "I", "ST", "AT", "IT" };

static inline rec *rec_new(const char *name, mode m)
{
    rec *r = (rec *)calloc(1, sizeof *r);

    if (!r) abort();
    rec_init(r, name, m);
    return r;
}

/* What everybody must be able to say at the end. */
#define CHECK_REC(r)                                                   \
    do {                                                               \
        if ((r)->wrong) TEST_FAIL("%s: %s", (r)->name, (r)->wrong);    \
        if ((r)->inside) TEST_FAIL("%s is still inside", (r)->name);   \
        if ((r)->starts != (r)->finishes)                              \
            TEST_FAIL("%s saw %u starts and %u finishes: %s", (r)->name, \
                      (r)->starts, (r)->finishes, (r)->log);           \
    } while (0)

/* ---- the transport: counts requests, then plays or is fed by the test --- */

typedef struct spy {
    llmcb_transport base; /* first */
    llmcb_transport *inner;
    unsigned requests, open, peak;
    llmcb_exchange *fed; /* without an inner transport: the last one */
    char body[4096];     /* of the last request */
} spy;

static inline llmcb_code spy_start(llmcb_transport *tr, llmcb_exchange *x,
                                   const llmcb_request *q)
{
    spy *s = (spy *)(void *)tr;

    s->requests++;
    if (++s->open > s->peak) s->peak = s->open;
    snprintf(s->body, sizeof s->body, "%.*s", (int)q->body_len, q->body);
    note("request");
    s->fed = x;
    return s->inner ? s->inner->start(s->inner, x, q) : LLMCB_OK;
}

static inline void spy_resume(llmcb_transport *tr, llmcb_exchange *x)
{
    spy *s = (spy *)(void *)tr;

    if (s->inner) s->inner->resume(s->inner, x);
}

/* A response that has ended is not let go of through these two: tests that
 * count open requests use recordings that are cut short by [DONE]. */
static inline void spy_release(llmcb_transport *tr, llmcb_exchange *x)
{
    spy *s = (spy *)(void *)tr;

    s->open--;
    note("released");
    if (s->fed == x) s->fed = NULL;
    if (s->inner) s->inner->release(s->inner, x);
}

static inline void spy_cancel(llmcb_transport *tr, llmcb_exchange *x)
{
    spy *s = (spy *)(void *)tr;

    s->open--;
    note("dropped");
    if (s->fed == x) s->fed = NULL;
    if (s->inner) s->inner->cancel(s->inner, x);
}

/* ---- the scene: a loop, a chat and what the server says ------------------ */

#define MAX_TAPES 24
typedef struct scene {
    heap heap;
    llmcb_loop_desc ld;
    llmcb_chat_desc cd;
    bool fed; /* no recording: the test plays the server */
    llmcb_loop *loop;
    llmcb_chat *chat;
    spy spy;
    llmcb_recording tapes[MAX_TAPES];
    llmcb_segment *segments[MAX_TAPES];
    char *bytes[MAX_TAPES];
    size_t n_tapes;
    llmcb_handler *handlers[16];
    size_t n_handlers;
} scene;

#define OK_HEAD "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
#define DONE "|$|[DONE]"

/* Events as a server sends them, from pieces with | between: text; $ for a
 * finish reason; raw data if it begins with { or [. Returns its length, and
 * where each begins. */
static inline size_t events_text(char *out, const char *pieces, size_t *begins,
                                 size_t *n)
{
    const char *p = pieces;
    size_t len = 0, k = 0;

    while (p) {
        const char *bar = strchr(p, '|');
        int size = (int)(bar ? (size_t)(bar - p) : strlen(p));
        if (begins) begins[k] = len;
        k++;
        if (*p == '{' || *p == '[')
            len += (size_t)sprintf(out + len, "data: %.*s\n\n", size, p);
        else if (*p == '$')
            len += (size_t)sprintf(out + len,
                                   "data: {\"choices\":[{\"index\":0,"
                                   "\"delta\":{},\"finish_reason\":"
                                   "\"stop\"}]}\n\n");
        else
            len += (size_t)sprintf(out + len,
                                   "data: {\"choices\":[{\"index\":0,"
                                   "\"delta\":{\"content\":\"%.*s\"}}]}\n\n",
                                   size, p);
        p = bar ? bar + 1 : NULL;
    }
    if (n) *n = k;
    return len;
}

/* One response of the server: pieces `gap` ms apart. */
static inline void scene_tape(scene *s, const char *head, const char *pieces,
                              int64_t gap, llmcb_replay_end end)
{
    size_t i = s->n_tapes++, n, k, most = count_of(pieces, "|") + 1;
    size_t *begins = (size_t *)malloc(most * sizeof *begins);
    llmcb_recording *rec = &s->tapes[i];

    s->bytes[i] = (char *)malloc(strlen(head) + strlen(pieces) + most * 80);
    s->segments[i] =
        (llmcb_segment *)malloc((most + 1) * sizeof *s->segments[i]);
    if (!begins || !s->bytes[i] || !s->segments[i]) abort();
    strcpy(s->bytes[i], head);
    rec->bytes = s->bytes[i];
    rec->len = strlen(head);
    rec->end = end;
    if (*pieces) {
        size_t at = rec->len;
        rec->len += events_text(s->bytes[i] + at, pieces, begins, &n);
        s->segments[i][0].offset = 0;
        s->segments[i][0].delay_ms = 0;
        for (k = 0; k < n; k++) {
            s->segments[i][k + 1].offset = at + begins[k];
            s->segments[i][k + 1].delay_ms = gap;
        }
        if (gap) {
            rec->segments = s->segments[i];
            rec->n_segments = n + 1;
        }
    }
    free(begins);
}

static inline void scene_init(scene *s)
{
    alarm(60);
    memset(s, 0, sizeof *s);
    pthread_mutex_init(&s->heap.m, NULL);
    pthread_mutex_lock(&trace_lock);
    trace_len = 0;
    *trace = '\0';
    pthread_mutex_unlock(&trace_lock);
    s->ld.virtual_clock = true;
    s->ld.allocator.resize = heap_resize;
    s->ld.allocator.user = &s->heap;
    s->cd.streaming = true;
    s->cd.base_url = "http://localhost/v1";
    s->cd.api_key = "";
}

static inline void scene_add(scene *s, rec *r)
{
    s->handlers[s->n_handlers++] = &r->h;
}

/* false: no memory. */
static inline bool scene_open(scene *s)
{
    llmcb_replay_desc rd;

    memset(&rd, 0, sizeof rd);
    rd.recordings = s->tapes;
    rd.n_recordings = s->n_tapes;
    s->loop = llmcb_loop_new(&s->ld);
    if (!s->loop) return false;
    s->spy.inner = s->fed ? NULL : llmcb_replay_new(s->loop, &rd);
    if (!s->fed && s->heap.fail_at && s->heap.calls >= s->heap.fail_at)
        return false; /* without memory for it, it refuses all requests */
    s->spy.base.state_size = s->fed ? 0 : s->spy.inner->state_size;
    s->spy.base.start = spy_start;
    s->spy.base.resume = spy_resume;
    s->spy.base.release = spy_release;
    s->spy.base.cancel = spy_cancel;
    llmcb_transport_init(s->loop, &s->spy.base);
    if (s->fed) /* the test takes its time, and virtual time would jump */
        s->cd.connect_ms = s->cd.first_byte_ms = s->cd.idle_ms =
            LLMCB_FOREVER;
    s->cd.transport = &s->spy.base;
    s->cd.callbacks = s->handlers;
    s->cd.n_callbacks = s->n_handlers;
    s->chat = llmcb_chat_new(s->loop, &s->cd);
    return s->chat != NULL;
}

/* A call with the prompt "hi" and the chat's own handlers. */
static inline llmcb_op *scene_call(scene *s)
{
    llmcb_message m;

    memset(&m, 0, sizeof m);
    m.content = "hi";
    return llmcb_chat_generate(s->chat, &m, 1, NULL);
}

/* The same for one handler, or none, beside the chat's. */
static inline llmcb_op *scene_call_with(scene *s, rec *r)
{
    llmcb_message m;
    llmcb_config config;
    llmcb_handler *one[1];

    memset(&m, 0, sizeof m);
    memset(&config, 0, sizeof config);
    m.content = "hi";
    one[0] = r ? &r->h : NULL;
    config.callbacks = one;
    config.n_callbacks = r ? 1 : 0;
    return llmcb_chat_generate(s->chat, &m, 1, &config);
}

static inline llmcb_op *scene_stream(scene *s)
{
    llmcb_message m;

    memset(&m, 0, sizeof m);
    m.content = "hi";
    return llmcb_chat_stream(s->chat, &m, 1, NULL);
}

/* The rest of a test: frees all and looks for leaks. */
static inline void scene_close(scene *s)
{
    size_t i;

    llmcb_chat_free(s->chat);
    CHECK_INT(llmcb_loop_free(s->loop), LLMCB_OK);
    CHECK_INT(s->heap.blocks, 0);
    CHECK_INT(s->heap.bytes, 0);
    CHECK(!s->heap.wrong);
    for (i = 0; i < s->n_tapes; i++) {
        free(s->bytes[i]);
        free(s->segments[i]);
    }
    pthread_mutex_destroy(&s->heap.m);
}

/* Turns until a function has come to the gate for the n-th time. */
static inline void turn_to_gate(scene *s, gate *g, unsigned n)
{
    while (gate_came(g) < n) llmcb_loop_run_once(s->loop, 0);
}

static inline void turns(scene *s, int n)
{
    while (n--) llmcb_loop_run_once(s->loop, 0);
}

/* Turns until that many requests have been made. */
static inline void turn_to_request(scene *s, unsigned n)
{
    int i;

    for (i = 0; i < 20000 && s->spy.requests < n; i++) {
        struct timespec ts = { 0, 1000000 };
        llmcb_loop_run_once(s->loop, 0);
        /* a thread of the pool may wait for a processor */
        if (i > 1000) nanosleep(&ts, NULL);
    }
}

/* What the server of a fed scene says next; as a post, since that is where a
 * transport would do it. */
typedef struct feed {
    llmcb_exchange *x;
    char bytes[4096];
    size_t len;
    gate *let, *until; /* before it: opens one gate, waits at another */
    unsigned until_n;
} feed;

static inline void feed_arrive(void *arg)
{
    feed *f = (feed *)arg;

    if (f->let) gate_let(f->let, ALL);
    if (f->until) gate_wait(f->until, f->until_n);
    if (f->len) llmcb_exchange_data(f->x, f->bytes, f->len);
    free(f);
}

static inline feed *feed_new(scene *s, const char *pieces)
{
    feed *f = (feed *)calloc(1, sizeof *f);

    if (!f) abort();
    f->x = s->spy.fed;
    if (*pieces) f->len = events_text(f->bytes, pieces, NULL, NULL);
    return f;
}

static inline void feed_events(scene *s, const char *pieces)
{
    llmcb_loop_post(s->loop, feed_arrive, feed_new(s, pieces));
    llmcb_loop_run_once(s->loop, 0);
}

static inline void feed_head(scene *s)
{
    llmcb_str name = { "content-type", 12 };
    llmcb_str value = { "text/event-stream", 17 };

    llmcb_exchange_connected(s->spy.fed);
    llmcb_exchange_status(s->spy.fed, 200);
    llmcb_exchange_header(s->spy.fed, name, value);
    turns(s, 1);
}

/* What hangs is killed: each scene has the time that scene_init gives. */
static inline int scene_main(int argc, char **argv)
{
    alarm(60);
    return test_main(argc, argv);
}
#endif

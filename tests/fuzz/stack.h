/* A whole chat for wire.c and chat.c: a loop with a virtual clock, recorded
 * answers, handlers that check what they are told while they are told. No
 * threads, so that an input always does the same. */
#ifndef STACK_H
#define STACK_H
#include "fuzz.h"

#define STACK_CHOICES 4
#define STACK_TOOLS 6

/* One handler's view of one run. */
typedef struct view {
    const llmcb_run *run;
    uint64_t seq, events, skipped;
    unsigned starts, finishes;
    bool inside;
    llmcbi_buf text[STACK_CHOICES], refusal[STACK_CHOICES];
    llmcbi_buf reasoning[STACK_CHOICES];
    llmcbi_buf arguments[STACK_CHOICES][STACK_TOOLS];
} view;

typedef struct stack stack;

typedef struct viewer {
    llmcb_handler h; /* first */
    stack *stack;
    int64_t ms;       /* what an async event takes */
    unsigned at, act; /* at event `at`: see viewer_act */
    unsigned events;
    bool raised; /* it failed, which ended the run */
    view views[2];
} viewer;

struct stack {
    llmcb_loop_desc ld;
    llmcb_chat_desc cd;
    llmcb_recording tapes[3];
    size_t n_tapes, n_prompts;
    bool pull, leave;  /* read chunks; free the loop with the call under way */
    int64_t cancel_ms; /* 0: not by the clock */
    viewer viewers[3];
    llmcb_handler *handlers[3];
    llmcb_loop *loop;
    llmcb_op *op;
    llmcb_code code;
    bool raised, cancelled; /* by a viewer; or by the clock */
    llmcbi_buf log, pulled;
};

/* Text of the library: valid UTF-8 with a NUL behind it. */
static inline void stack_text(llmcb_str s)
{
    FUZZ_CHECK(s.ptr && s.ptr[s.len] == '\0');
    FUZZ_CHECK(llmcbi_utf8_valid(s.ptr, s.len));
}

static inline void view_token(view *v, const llmcb_chunk *c)
{
    const llmcb_parts *p = c->parts;
    size_t i, k = (size_t)c->choice;

    stack_text(c->text);
    stack_text(p->refusal);
    stack_text(p->reasoning);
    stack_text(p->finish_reason);
    stack_text(p->logprobs);
    FUZZ_CHECK(!p->logprobs.len || fuzz_json_valid(p->logprobs));
    FUZZ_CHECK(k < STACK_CHOICES);
    fuzz_note(&v->text[k], c->text.ptr, c->text.len);
    fuzz_note(&v->refusal[k], p->refusal.ptr, p->refusal.len);
    fuzz_note(&v->reasoning[k], p->reasoning.ptr, p->reasoning.len);
    for (i = 0; i < p->n_tool_calls; i++) {
        const llmcb_tool_delta *d = &p->tool_calls[i];
        FUZZ_CHECK(d->index < STACK_TOOLS);
        stack_text(d->id);
        stack_text(d->name);
        stack_text(d->arguments);
        fuzz_note(&v->arguments[k][d->index], d->arguments.ptr,
                  d->arguments.len);
    }
}

/* What was told is the beginning of the result, or all of it. What an event
 * brought that then failed for a limit or memory may not have been told. */
static inline void view_told(const llmcbi_buf *told, llmcb_str all, bool whole)
{
    stack_text(all);
    FUZZ_CHECK(told->len <= all.len && (!whole || told->len == all.len));
    if (told->len) FUZZ_CHECK(memcmp(told->ptr, all.ptr, told->len) == 0);
}

static inline void view_result(const view *v, const llmcb_event *ev, bool told)
{
    const llmcb_result *r = ev->result;
    llmcb_code code = ev->error ? ev->error->code : LLMCB_OK;
    bool whole =
        code != LLMCB_ELIMIT && code != LLMCB_ENOMEM && told && !ev->skipped;
    size_t i, k;

    FUZZ_CHECK(r->complete == (code == LLMCB_OK));
    stack_text(r->model_name);
    stack_text(r->id);
    stack_text(r->system_fingerprint);
    FUZZ_CHECK(r->n_generations <= STACK_CHOICES);
    for (i = 0; i < r->n_generations; i++) {
        const llmcb_generation *g = &r->generations[i];
        stack_text(g->finish_reason);
        stack_text(g->logprobs);
        FUZZ_CHECK(!g->logprobs.len || fuzz_json_valid(g->logprobs));
        view_told(&v->text[i], g->text, told && !ev->skipped);
        view_told(&v->refusal[i], g->refusal, whole);
        view_told(&v->reasoning[i], g->reasoning, whole);
        FUZZ_CHECK(g->n_tool_calls <= STACK_TOOLS);
        for (k = 0; k < g->n_tool_calls; k++) {
            const llmcb_tool_call *c = &g->tool_calls[k];
            bool object =
                c->arguments.len &&
                *fuzz_json_space(c->arguments.ptr,
                                 c->arguments.ptr + c->arguments.len) == '{';
            stack_text(c->id);
            stack_text(c->name);
            view_told(&v->arguments[i][k], c->arguments, whole);
            FUZZ_CHECK(
                c->valid ==
                (c->name.len && (!c->arguments.len ||
                                 (object && fuzz_json_valid(c->arguments)))));
        }
    }
}

/* Acts of a handler: 1 cancels, 2 frees, 4 and 5 fail, 6 adds a text. */
static inline int viewer_act(viewer *w, const llmcb_event *ev)
{
    stack *s = w->stack;

    if (++w->events != w->at) return 0;
    if (w->act == 1 || w->act == 2) s->cancelled = true;
    if (w->act == 1) llmcb_op_cancel(s->op);
    if (w->act == 2) {
        llmcb_op_free(s->op);
        s->op = NULL;
    }
    if (w->act == 6) llmcb_run_text(ev->run, fuzz_str("text"));
    if (w->act != 4 && w->act != 5) return 0;
    if (w->h.flags & LLMCB_RAISE) s->raised = w->raised = true;
    return w->act == 4 ? -3 : 7;
}

static inline view *viewer_enter(viewer *w, const llmcb_event *ev)
{
    view *v = &w->views[w->views[0].run && w->views[0].run != ev->run];
    bool start = ev->kind == LLMCB_CHAT_MODEL_START;
    bool finish = ev->kind == LLMCB_LLM_END || ev->kind == LLMCB_LLM_ERROR;

    v->run = ev->run;
    FUZZ_CHECK(!v->inside && !v->finishes);
    FUZZ_CHECK(start == !v->seq && start == (ev->seq == 1));
    FUZZ_CHECK(ev->seq > v->seq && (finish || ev->seq == v->seq + 1));
    FUZZ_CHECK(start == !!ev->start && finish == !!ev->result);
    FUZZ_CHECK((ev->kind == LLMCB_LLM_NEW_TOKEN) == !!ev->token);
    FUZZ_CHECK((ev->kind == LLMCB_LLM_ERROR) == !!ev->error);
    FUZZ_CHECK((ev->kind == LLMCB_RETRY) == !!ev->retry);
    FUZZ_CHECK(!ev->skipped || ev->kind == LLMCB_LLM_ERROR);
    v->inside = true;
    v->seq = ev->seq;
    v->events++;
    v->starts += start;
    v->finishes += finish;
    v->skipped += ev->skipped;
    if (ev->token) view_token(v, ev->token);
    if (ev->retry)
        FUZZ_CHECK(ev->retry->delay_ms >= 0 && ev->retry->error->code);
    if (finish) {
        /* after a raise this handler is told no more than the finish */
        bool passed =
            w->raised || (w->stack->raised && w->h.flags & LLMCB_AWAIT_EACH);
        FUZZ_CHECK(v->seq == v->events + v->skipped || passed);
        view_result(v, ev,
                    !passed && (w->stack->cd.streaming || w->stack->pull));
    }
    if (ev->error) {
        stack_text(fuzz_str(ev->error->message));
        FUZZ_CHECK(*ev->error->message && ev->error->code < 0);
    }
    return v;
}

static inline int viewer_sync(llmcb_handler *h, const llmcb_event *ev)
{
    viewer *w = (viewer *)(void *)h;
    view *v = viewer_enter(w, ev);
    int result = viewer_act(w, ev);

    v->inside = false;
    return result;
}

static inline llmcb_step viewer_async(llmcb_task *t, llmcb_handler *h,
                                      const llmcb_event *ev)
{
    viewer *w = (viewer *)(void *)h;

    LLMCB_BEGIN(t);
    viewer_enter(w, ev);
    if (w->ms) LLMCB_AWAIT(t, llmcb_sleep(t, w->ms));
    w->views[w->views[0].run != ev->run].inside = false;
    if (ev->token) stack_text(ev->token->text); /* it is still there */
    return viewer_act(w, ev);
    LLMCB_END(t);
}

static inline void viewer_init(viewer *w, bool async)
{
#define STACK_ON(event)                  \
    if (async)                           \
        w->h.async.event = viewer_async; \
    else                                 \
        w->h.sync.event = viewer_sync
    STACK_ON(on_chat_model_start);
    STACK_ON(on_llm_new_token);
    STACK_ON(on_llm_end);
    STACK_ON(on_llm_error);
    STACK_ON(on_retry);
    STACK_ON(on_text);
#undef STACK_ON
    if (!async) w->h.flags |= LLMCB_INLINE;
}

static inline void viewer_drop(viewer *w)
{
    int i, k, j;

    for (i = 0; i < 2; i++)
        for (k = 0; k < STACK_CHOICES; k++) {
            fuzz_drop(&w->views[i].text[k]);
            fuzz_drop(&w->views[i].refusal[k]);
            fuzz_drop(&w->views[i].reasoning[k]);
            for (j = 0; j < STACK_TOOLS; j++)
                fuzz_drop(&w->views[i].arguments[k][j]);
        }
}

/* ---- the call ------------------------------------------------------------ */

static inline llmcb_step stack_cancel(llmcb_task *t)
{
    stack *s = (stack *)t->self;

    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_sleep(t, s->cancel_ms));
    s->cancelled = true;
    llmcb_op_cancel(s->op);
    LLMCB_END(t);
}

/* All of the result that does not depend on when it came. */
static inline void stack_log(stack *s, const llmcb_op *op)
{
    const llmcb_result *r = llmcb_op_result(op);
    size_t i, k;

    fuzz_note_int(&s->log, llmcb_op_code(op));
    fuzz_note_str(&s->log, fuzz_str(llmcb_op_error(op)->message));
    fuzz_note_str(&s->log, r->model_name);
    fuzz_note_str(&s->log, r->id);
    fuzz_note_int(&s->log, r->usage.total_tokens);
    for (i = 0; i < r->n_generations; i++) {
        const llmcb_generation *g = &r->generations[i];
        fuzz_note_str(&s->log, g->text);
        fuzz_note_str(&s->log, g->refusal);
        fuzz_note_str(&s->log, g->reasoning);
        fuzz_note_str(&s->log, g->finish_reason);
        fuzz_note_str(&s->log, g->logprobs);
        for (k = 0; k < g->n_tool_calls; k++) {
            fuzz_note_str(&s->log, g->tool_calls[k].id);
            fuzz_note_str(&s->log, g->tool_calls[k].name);
            fuzz_note_str(&s->log, g->tool_calls[k].arguments);
            fuzz_note_int(&s->log, g->tool_calls[k].valid);
        }
    }
}

static inline void stack_call(stack *s, llmcb_chat *chat)
{
    llmcb_message m[2];
    llmcb_prompt prompts[2];
    const llmcb_chunk *chunk;
    llmcb_op *cancel = NULL;

    memset(m, 0, sizeof m);
    m[0].content = "?";
    m[1].content = "!";
    prompts[0].messages = prompts[1].messages = m;
    prompts[0].n = 1;
    prompts[1].n = 2;
    if (s->cancel_ms) cancel = llmcb_task_start(s->loop, stack_cancel, 0, s);
    if (s->pull)
        s->op = llmcb_chat_stream(chat, m, 1, NULL);
    else if (s->n_prompts > 1)
        s->op = llmcb_chat_batch(chat, prompts, s->n_prompts, NULL);
    else
        s->op = llmcb_chat_generate(chat, m, 1, NULL);
    while (s->pull && llmcb_op_next(s->op, &chunk)) {
        stack_text(chunk->text);
        if (!chunk->choice)
            fuzz_note(&s->pulled, chunk->text.ptr, chunk->text.len);
    }
    if (s->leave) {
        llmcb_loop_run_once(s->loop, 0);
        llmcb_loop_run_once(s->loop, 0);
    } else {
        FUZZ_CHECK(llmcb_loop_run(s->loop) == LLMCB_OK);
        FUZZ_CHECK(llmcb_op_done(s->op) && !llmcb_loop_alive(s->loop));
        s->code = s->op ? llmcb_op_code(s->op) : LLMCB_ENOMEM;
        FUZZ_CHECK(s->code <= LLMCB_OK);
        stack_log(s, s->op);
        if (s->op && s->pull && !s->cancelled &&
            llmcb_op_result(s->op)->n_generations)
            FUZZ_CHECK(
                llmcbi_str_equal(llmcb_op_result(s->op)->generations[0].text,
                                 llmcbi_buf_str(&s->pulled)));
        llmcb_op_free(s->op);
        s->op = NULL;
        llmcb_op_free(cancel);
    }
}

static inline void stack_run(stack *s)
{
    llmcb_replay_desc rd;
    llmcb_chat *chat;
    size_t i, k;

    memset(&rd, 0, sizeof rd);
    rd.recordings = s->tapes;
    rd.n_recordings = s->n_tapes;
    s->ld.virtual_clock = true;
    s->ld.allocator = fuzz_alloc;
    s->cd.base_url = "http://localhost/v1";
    s->cd.api_key = "";
    s->cd.organization = "";
    s->cd.limits.choices = STACK_CHOICES;
    s->cd.limits.tool_calls = STACK_TOOLS;
    s->cd.callbacks = s->handlers;
    s->loop = llmcb_loop_new(&s->ld);
    if (s->loop)
        for (i = 0; i < 4; i++)
            s->loop->random.s[i] = fuzz_seed() + i;
    s->cd.transport = s->loop ? llmcb_replay_new(s->loop, &rd) : NULL;
    if (s->cd.transport) {
        chat = llmcb_chat_new(s->loop, &s->cd);
        stack_call(s, chat);
        llmcb_chat_free(chat);
    }
    FUZZ_CHECK(!s->loop || llmcb_loop_free(s->loop) == LLMCB_OK);
    FUZZ_CHECK(fuzz_heap.live == 0);
    for (i = 0; i < s->cd.n_callbacks; i++)
        for (k = 0; k < 2; k++) {
            const view *v = &s->viewers[i].views[k];
            bool given_up =
                s->cd.handler_ms && s->viewers[i].ms >= s->cd.handler_ms;
            FUZZ_CHECK(v->starts == v->finishes || (given_up && !v->finishes));
            FUZZ_CHECK(!v->inside);
        }
}

static inline void stack_add(stack *s, bool async)
{
    viewer *w = &s->viewers[s->cd.n_callbacks];

    w->stack = s;
    viewer_init(w, async);
    s->handlers[s->cd.n_callbacks++] = &w->h;
}

static inline void stack_drop(stack *s)
{
    size_t i;

    for (i = 0; i < s->cd.n_callbacks; i++)
        viewer_drop(&s->viewers[i]);
    fuzz_drop(&s->log);
    fuzz_drop(&s->pulled);
}
#endif

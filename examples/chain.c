/*
 * chain.c - prompt | model | parser, as LangChain composes them
 *
 *     build/examples/chain
 *
 * Also a map, a fallback and a retry. Offline and in virtual time.
 */
#define LLMCB_IMPLEMENTATION
#include "llmcb.h"
#include <stdio.h>
#include <string.h>

/* Makes a text of a text. It is in one run at a time. */
struct runnable {
    const char *name;
    llmcb_task_fn body; /* NULL: it asks the model */
    llmcb_chat *chat;
    const char *text;              /* of a prompt; the key in a map */
    struct runnable *const *parts; /* of a retry all the same */
    size_t n, at;
    llmcb_op *op; /* its run */
    llmcb_str input;
};

/* Starts it. The input must last as long as the run. */
static llmcb_op *invoke(struct runnable *r, llmcb_loop *loop, llmcb_str input,
                        const llmcb_config *config)
{
    llmcb_message message = { .content = input.ptr, .content_len = input.len };
    llmcb_run_desc desc = {
        .name = r->name, .input = input, .body = r->body, .self = r
    };
    llmcb_op_free(r->op);
    r->input = input;
    r->op = r->body ? llmcb_run_start(loop, &desc, config)
                    : llmcb_chat_generate(r->chat, &message, 1, config);
    return r->op;
}

static llmcb_op *invoke_part(llmcb_task *t, struct runnable *part,
                             llmcb_str input, const char *tag)
{
    llmcb_config config = llmcb_run_child(llmcb_task_run(t), tag);
    return invoke(part, llmcb_task_loop(t), input, &config);
}

static llmcb_str output_of(const struct runnable *r)
{
    return r->body ? llmcb_op_output(r->op)->text
                   : llmcb_op_result(r->op)->generations[0].text;
}

/* Ends the run whose body t is as the run of a part has ended. */
static llmcb_step end_as(llmcb_task *t, const struct runnable *part)
{
    if (llmcb_op_code(part->op) == LLMCB_OK)
        return llmcb_run_end(llmcb_task_run(t), output_of(part));
    llmcb_run_fail(llmcb_task_run(t), llmcb_op_error(part->op));
    return llmcb_op_code(part->op);
}

static llmcb_step prompt(llmcb_task *t)
{
    struct runnable *r = (struct runnable *)t->self;
    char text[500];
    snprintf(text, sizeof text, r->text, r->input.ptr);
    return llmcb_run_end(llmcb_task_run(t), llmcb_text(text));
}

static llmcb_step first_line(llmcb_task *t)
{
    llmcb_str line = ((struct runnable *)t->self)->input;
    line.len = strcspn(line.ptr, "\n");
    return llmcb_run_end(llmcb_task_run(t), line);
}

/* One after the other, each with what the one before has brought. */
static llmcb_step sequence(llmcb_task *t)
{
    struct runnable *r = (struct runnable *)t->self;
    llmcb_str input = r->input;
    char tag[40];
    LLMCB_BEGIN(t);
    for (r->at = 0;; r->at++) {
        if (r->at) input = output_of(r->parts[r->at - 1]);
        snprintf(tag, sizeof tag, "seq:step:%d", (int)r->at + 1);
        invoke_part(t, r->parts[r->at], input, tag);
        LLMCB_AWAIT(t, llmcb_await(t, r->parts[r->at]->op));
        if (t->result != LLMCB_OK || r->at + 1 == r->n)
            return end_as(t, r->parts[r->at]);
    }
    LLMCB_END(t);
}

/* All at once, with the same input. */
static llmcb_step parallel(llmcb_task *t)
{
    struct runnable *r = (struct runnable *)t->self;
    char text[500] = "", tag[40];
    llmcb_op *ops[4];
    size_t i, len = 0;
    LLMCB_BEGIN(t);
    for (i = 0; i < r->n; i++) {
        snprintf(tag, sizeof tag, "map:key:%s", r->parts[i]->text);
        ops[i] = invoke_part(t, r->parts[i], r->input, tag);
    }
    LLMCB_AWAIT(t, llmcb_await_all(t, ops, r->n, LLMCB_FOREVER));
    for (i = 0; i < r->n; i++, len = strlen(text)) {
        if (llmcb_op_code(r->parts[i]->op) != LLMCB_OK)
            return end_as(t, r->parts[i]);
        snprintf(text + len, sizeof text - len, "%s: %s\n", r->parts[i]->text,
                 output_of(r->parts[i]).ptr);
    }
    return llmcb_run_end(llmcb_task_run(t), llmcb_text(text));
    LLMCB_END(t);
}

/* The first part that does not fail: a fallback, or a retry. */
static llmcb_step first_of(llmcb_task *t)
{
    struct runnable *r = (struct runnable *)t->self;
    char tag[40];
    LLMCB_BEGIN(t);
    for (r->at = 0;; r->at++) {
        snprintf(tag, sizeof tag, "retry:attempt:%d", (int)r->at + 1);
        invoke_part(t, r->parts[r->at], r->input,
                    r->at && r->parts[r->at] == r->parts[0] ? tag : NULL);
        LLMCB_AWAIT(t, llmcb_await(t, r->parts[r->at]->op));
        if (t->result == LLMCB_ECANCELLED) return t->result;
        if (t->result == LLMCB_OK || r->at + 1 == r->n)
            return end_as(t, r->parts[r->at]);
    }
    LLMCB_END(t);
}

static int show(llmcb_handler *h, const llmcb_event *ev)
{
    printf("%4d ms  %-19s  %s", (int)llmcb_loop_now((llmcb_loop *)h->user),
           llmcb_event_name(ev->kind), ev->run->name);
    printf("%s%s\n", ev->run->n_tags ? "  " : "",
           ev->run->n_tags ? ev->run->tags[0] : "");
    return 0;
}

static struct runnable model(llmcb_loop *loop, const char *recording)
{
    llmcb_replay_desc replay = { .path = recording };
    llmcb_chat_desc desc = { .max_retries = -1,
                             .transport = llmcb_replay_new(loop, &replay) };
    struct runnable r = { .chat = llmcb_chat_new(loop, &desc) };
    return r;
}

static struct runnable made(const char *name, llmcb_task_fn body,
                            struct runnable *const *parts, size_t n)
{
    struct runnable r = { .name = name, .body = body, .parts = parts, .n = n };
    return r;
}

int main(void)
{
    llmcb_loop_desc desc = { .virtual_clock = true };
    llmcb_loop *loop = llmcb_loop_new(&desc);
    llmcb_handler *tree = llmcb_tree_handler(loop, stdout);
    llmcb_handler h = { .flags = LLMCB_INLINE, .user = loop };
    llmcb_handler *callbacks[] = { &h, tree };
    llmcb_config config = { .callbacks = callbacks, .n_callbacks = 2 };
    struct runnable gpt = model(loop, "examples/recordings/pun.http");
    struct runnable poet = model(loop, "examples/recordings/poem.http");
    struct runnable busy = model(loop, "examples/recordings/busy.http");
    struct runnable ask = made("ChatPromptTemplate", prompt, NULL, 0);
    struct runnable parse = made("StrOutputParser", first_line, NULL, 0);
    struct runnable *steps[] = { &ask, &gpt, &parse };
    struct runnable chain = made("RunnableSequence", sequence, steps, 3);
    struct runnable *sides[] = { &chain, &poet };
    struct runnable map = made("RunnableParallel", parallel, sides, 2);
    struct runnable *both[] = { &busy, &gpt };
    struct runnable safe = made("RunnableWithFallbacks", first_of, both, 2);
    struct runnable *again[] = { &busy, &busy, &busy };
    struct runnable retry = made("RunnableRetry", first_of, again, 3);
    struct runnable *all[] = { &chain, &map,  &safe, &retry, &ask,
                               &gpt,   &poet, &busy, &parse };
    h.sync.on_chat_model_start = h.sync.on_llm_end = h.sync.on_llm_error = show;
    h.sync.on_chain_start = h.sync.on_chain_end = h.sync.on_chain_error = show;
    ask.text = "Tell me a joke about %s.";
    chain.text = "joke";
    poet.text = "poem";
    for (int i = 0; i < 4; i++) {
        llmcb_op_wait(invoke(all[i], loop, llmcb_text("atoms"), &config));
        printf("%s\n\n", output_of(all[i]).ptr);
    }
    for (int i = 0; i < 9; i++) {
        llmcb_op_free(all[i]->op);
        llmcb_chat_free(all[i]->chat);
    }
    llmcb_handler_free(tree);
    return llmcb_loop_free(loop) != LLMCB_OK;
}

/*
 * trace.c - every callback of a chat call, as one JSON object a line
 *
 *     build/examples/trace [--base-url URL] [--model NAME] [--system TEXT]
 *         [--method generate|stream] [--no-stream] [--max-tokens N]
 *         [--max-retries N] [--connect-ms N] [--first-byte-ms N]
 *         [--idle-ms N] [--total-ms N] [--transport curl|socket]
 *         [--handler async|sync|inline] [--tools FILE] [--cancel-after N]
 *         [--replay FILE] PROMPT...        (several prompts: one batch)
 *
 * The last line is the result. Exit status: 0, 1 when the call failed, 2 for
 * bad arguments.
 */
#define LLMCB_IMPLEMENTATION
#include "llmcb.h"
#include <inttypes.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void put_string(llmcb_str s)
{
    putchar('"');
    for (size_t i = 0; i < s.len; i++) {
        unsigned c = (unsigned char)s.ptr[i];
        if (c == '"' || c == '\\') putchar('\\');
        if (c == '\n')
            fputs("\\n", stdout);
        else
            printf(c < ' ' || c == 127 ? "\\u%04x" : "%c", c);
    }
    putchar('"');
}

/* Prints JSON, with ' for ". %d takes an int64_t, %s a C string to be quoted,
 * %r one as it is, %t a llmcb_str, %T one that is null when empty. */
static void json(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    for (; *format; format++) {
        llmcb_str s = { "", 0 };
        if (*format != '%') {
            putchar(*format == '\'' ? '"' : *format);
        } else if (*++format == 'd') {
            printf("%" PRId64, va_arg(args, int64_t));
        } else if (*format == 'r') {
            fputs(va_arg(args, const char *), stdout);
        } else if (*format == 's') {
            s.ptr = va_arg(args, const char *);
            s.len = strlen(s.ptr);
            put_string(s);
        } else {
            s = va_arg(args, llmcb_str);
            if (*format == 'T' && s.len == 0)
                fputs("null", stdout);
            else
                put_string(s);
        }
    }
    va_end(args);
}

static void put_usage(const char *key, llmcb_usage u)
{
    json(",%s:{'input_tokens':%d,'output_tokens':%d,'total_tokens':%d,"
         "'cached_tokens':%d,'reasoning_tokens':%d}",
         key, u.input_tokens, u.output_tokens, u.total_tokens, u.cached_tokens,
         u.reasoning_tokens);
}

/* One row: the candidates of one answer. */
static void put_row(const llmcb_result *r)
{
    json("[");
    for (size_t i = 0; i < r->n_generations; i++) {
        const llmcb_generation *g = &r->generations[i];
        json("%r{'text':%t,'finish_reason':%T,'tool_calls':[", i ? "," : "",
             g->text, g->finish_reason);
        for (size_t k = 0; k < g->n_tool_calls; k++) {
            const llmcb_tool_call *call = &g->tool_calls[k];
            json("%r{'id':%t,'name':%t,'arguments':%t,'valid':%r}",
                 k ? "," : "", call->id, call->name, call->arguments,
                 call->valid ? "true" : "false");
        }
        json("],'refusal':%T,'reasoning':%T}", g->refusal, g->reasoning);
    }
    json("]");
}

static void put_start(const llmcb_run *run, const llmcb_start *start)
{
    json(",'name':%s,'tags':[", run->name);
    for (size_t i = 0; i < run->n_tags; i++)
        json("%r%s", i ? "," : "", run->tags[i]);
    json("],'metadata':{");
    for (size_t i = 0; i < run->n_metadata; i++)
        json("%r%s:%s", i ? "," : "", run->metadata[i].key,
             run->metadata[i].value);
    json("},'messages':[");
    for (size_t i = 0; i < start->n_messages; i++) {
        llmcb_str content = { start->messages[i].content,
                              start->messages[i].content_len };
        json("%r{'role':%s,'content':%T}", i ? "," : "",
             llmcb_role_name(start->messages[i].role), content);
    }
    json("]");
}

static void put_token(const llmcb_chunk *chunk)
{
    const llmcb_parts *parts = chunk->parts;
    json(",'text':%t,'choice':%d", chunk->text, (int64_t)chunk->choice);
    for (size_t i = 0; i < parts->n_tool_calls; i++) {
        const llmcb_tool_delta *d = &parts->tool_calls[i];
        json("%r{'index':%d,'id':%T,'name':%T,'arguments':%t}%r",
             i ? "," : ",\"tool_calls\":[", (int64_t)d->index, d->id, d->name,
             d->arguments, i + 1 == parts->n_tool_calls ? "]" : "");
    }
    if (parts->refusal.len) json(",'refusal':%t", parts->refusal);
    if (parts->reasoning.len) json(",'reasoning':%t", parts->reasoning);
    if (parts->finish_reason.len)
        json(",'finish_reason':%t", parts->finish_reason);
    if (parts->usage.known) put_usage("usage", parts->usage);
}

struct trace {
    llmcb_op *op;
    int64_t cancel_after, tokens;
};

static int print_event(llmcb_handler *h, const llmcb_event *ev)
{
    struct trace *trace = (struct trace *)h->user;
    const llmcb_error *error = ev->retry ? ev->retry->error : ev->error;
    llmcb_str parent = { ev->run->parent_id, strlen(ev->run->parent_id) };

    json("{'event':%s,'seq':%d,'run_id':%s,'parent_run_id':%T",
         llmcb_event_name(ev->kind), (int64_t)ev->seq, ev->run->id, parent);
    if (ev->start) put_start(ev->run, ev->start);
    if (ev->token) put_token(ev->token);
    if (ev->data) json(",'name':%T,'text':%t", ev->data->name, ev->data->text);
    if (ev->retry)
        json(",'attempt':%d,'delay_ms':%d", (int64_t)ev->retry->attempt,
             ev->retry->delay_ms);
    if (error)
        json(",'code':%s,'message':%s,'http_status':%d",
             llmcb_code_name(error->code), error->message,
             (int64_t)error->http_status);
    if (ev->result) {
        json(error ? ",'partial':[" : ",'generations':[");
        put_row(ev->result);
        json("]");
    }
    if (ev->result && !error) {
        json(",'llm_output':{'model_name':%t", ev->result->model_name);
        if (ev->result->usage.known)
            put_usage("token_usage", ev->result->usage);
        json("}");
    }
    json("}\n");
    fflush(stdout);
    if (ev->token && ++trace->tokens == trace->cancel_after)
        llmcb_op_cancel(trace->op);
    return 0;
}

static llmcb_step print_event_async(llmcb_task *t, llmcb_handler *h,
                                    const llmcb_event *ev)
{
    (void)t;
    print_event(h, ev);
    return LLMCB_DONE;
}

#define ALL_EVENTS(fn)                                                       \
    {                                                                        \
        .on_chat_model_start = fn, .on_llm_new_token = fn, .on_llm_end = fn, \
        .on_llm_error = fn, .on_text = fn, .on_retry = fn,                   \
        .on_custom_event = fn                                                \
    }
static const llmcb_sync_table sync_table = ALL_EVENTS(print_event);
static const llmcb_async_table async_table = ALL_EVENTS(print_event_async);

static bool is(const char *a, const char *b)
{
    return a && strcmp(a, b) == 0;
}

static int bad(const char *argument)
{
    fprintf(stderr, "trace: cannot use %s\n", argument);
    return 2;
}

int main(int argc, char **argv)
{
    const char *system_text = NULL, *method = "generate", *transport = NULL;
    const char *kind = "async", *tools = NULL, *replay = NULL;
    int64_t max_tokens = 0, max_retries = 2;
    struct trace trace = { .op = NULL };
    llmcb_handler handler = { .user = &trace }, *callbacks[] = { &handler };
    llmcb_chat_desc desc = { .streaming = true,
                             .callbacks = callbacks,
                             .n_callbacks = 1 };
    const struct {
        const char *name, **text;
        int64_t *number;
    } options[] = { { "--base-url", &desc.base_url, NULL },
                    { "--model", &desc.model, NULL },
                    { "--system", &system_text, NULL },
                    { "--method", &method, NULL },
                    { "--transport", &transport, NULL },
                    { "--handler", &kind, NULL },
                    { "--tools", &tools, NULL },
                    { "--replay", &replay, NULL },
                    { "--max-tokens", NULL, &max_tokens },
                    { "--max-retries", NULL, &max_retries },
                    { "--connect-ms", NULL, &desc.connect_ms },
                    { "--first-byte-ms", NULL, &desc.first_byte_ms },
                    { "--idle-ms", NULL, &desc.idle_ms },
                    { "--total-ms", NULL, &desc.total_ms },
                    { "--cancel-after", NULL, &trace.cancel_after } };
    const size_t n_options = sizeof options / sizeof *options;
    size_t n = 0, o; /* the n prompts move to the front of argv */

    for (int i = 1; i < argc; i++) {
        char *end = NULL;
        for (o = 0; o < n_options && !is(options[o].name, argv[i]); o++)
            continue;
        if (strncmp(argv[i], "--", 2) != 0)
            argv[n++] = argv[i];
        else if (is(argv[i], "--no-stream"))
            desc.streaming = false;
        else if (o == n_options || i + 1 == argc)
            return bad(argv[i]);
        else if (options[o].text)
            *options[o].text = argv[++i];
        else if ((*options[o].number = strtoll(argv[++i], &end, 10)) < 0 ||
                 *options[o].number > INT_MAX || end == argv[i] || *end)
            return bad(argv[i]);
    }
    if (n == 0) return bad("no prompt");
    if (!is(method, "generate") && !is(method, "stream")) return bad(method);
    if (n > 1 && is(method, "stream")) return bad("several prompts");
    desc.max_tokens = (int)max_tokens;
    desc.max_retries = max_retries > 0 ? (int)max_retries : -1;

    if (is(kind, "async"))
        handler.async = async_table;
    else if (is(kind, "sync") || is(kind, "inline"))
        handler.sync = sync_table;
    else
        return bad(kind);
    if (is(kind, "inline")) handler.flags = LLMCB_INLINE;

    static char tools_text[65536];
    FILE *file = tools ? fopen(tools, "r") : NULL;
    if (tools && (!file || !fread(tools_text, 1, sizeof tools_text - 1, file)))
        return bad(tools);
    if (file) fclose(file);
    desc.tools = tools ? tools_text : NULL;

    llmcb_loop *loop = llmcb_loop_new(NULL);
    llmcb_replay_desc recording = { .path = replay };
    if (replay)
        desc.transport = llmcb_replay_new(loop, &recording);
    else if (is(transport, "curl"))
        desc.transport = llmcb_curl_transport(loop);
    else if (is(transport, "socket"))
        desc.transport = llmcb_socket_transport(loop);
    if ((replay || transport) && !desc.transport) {
        llmcb_loop_free(loop);
        return bad(replay ? replay : transport);
    }

    llmcb_message *messages = (llmcb_message *)calloc(2 * n, sizeof *messages);
    llmcb_prompt *prompts = (llmcb_prompt *)calloc(n, sizeof *prompts);
    if (!messages || !prompts) return 1;
    for (size_t i = 0; i < n; i++) {
        messages[2 * i].role = LLMCB_SYSTEM;
        messages[2 * i].content = system_text;
        messages[2 * i + 1].content = argv[i];
        prompts[i].messages = &messages[2 * i + (system_text ? 0 : 1)];
        prompts[i].n = system_text ? 2 : 1;
    }

    const llmcb_chunk *chunk;
    llmcb_chat *chat = llmcb_chat_new(loop, &desc);
    llmcb_op *op =
        is(method, "stream")
            ? llmcb_chat_stream(chat, prompts->messages, prompts->n, NULL)
        : n > 1
            ? llmcb_chat_batch(chat, prompts, n, NULL)
            : llmcb_chat_generate(chat, prompts->messages, prompts->n, NULL);
    trace.op = op;
    if (is(method, "stream"))
        while (llmcb_op_next(op, &chunk))
            continue;
    llmcb_code code = llmcb_op_wait(op);

    json("{'event':'result','ok':%r,'code':%s,'generations':[",
         code == LLMCB_OK ? "true" : "false", llmcb_code_name(code));
    for (size_t i = 0; i < llmcb_op_n_prompts(op); i++) {
        json(i ? "," : "");
        put_row(llmcb_op_result_at(op, i));
    }
    json("]}\n");
    if (code != LLMCB_OK)
        fprintf(stderr, "trace: %s\n", llmcb_op_error(op)->message);

    llmcb_op_free(op);
    llmcb_chat_free(chat);
    llmcb_loop_free(loop);
    free(messages);
    free(prompts);
    return code != LLMCB_OK;
}

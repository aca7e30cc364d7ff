/* Streams made at random, and what comes of each: check_twins.sh builds this
 * with the shortcuts and without, and both must say the same.
 *
 *     twins FROM TO      a line for each of these seeds
 *
 * Events are alike or not, whole or broken, with texts of all kinds, reasoning
 * and pieces of tool calls; framed by all line ends, in chunks of one event or
 * several or none, read in pieces that end anywhere; limits are small now and
 * then, and the handler is inline, sync, async or not there. */
#define LLMCB_NO_CURL
#define LLMCB_IMPLEMENTATION
#include "llmcb.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t state;

static unsigned below(unsigned n)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (unsigned)(state >> 33) % n;
}

static bool one_in(unsigned n)
{
    return below(n) == 0;
}

/* The first TAME make no stream an error. */
#define TAME 16
static const char *const texts[] = {
    "", "a", " the", "\\n", "\\n\\n", "\\\"", "\\\\", "\\/", "\\u00e9",
    "\\u20ac", "\\ud83d\\ude00", "\xC3\xA9", "\xE2\x82\xAC", "0123456789abcdef",
    "0123456789abcdefg", " a text that is longer than those",
    "\\ud83d", "\\ude00", "\xC3", "\xFF", "\\u0000", "\\x", "\\u12g4", "\x01",
    "\"}", "\\",
};
enum { TEXTS = sizeof texts / sizeof *texts };

static size_t seen;

static void see(const void *bytes, size_t n)
{
    const unsigned char *p = (const unsigned char *)bytes;

    while (n--)
        seen = seen * 31 + *p++;
}

static int on_token(llmcb_handler *h, const llmcb_event *ev)
{
    const llmcb_parts *parts = ev->token->parts;
    size_t i;

    (void)h;
    see(ev->token->text.ptr, ev->token->text.len + 1);
    if (parts->reasoning.len) see(parts->reasoning.ptr, parts->reasoning.len);
    for (i = 0; i < parts->n_tool_calls; i++) {
        see(&parts->tool_calls[i].index, sizeof parts->tool_calls[i].index);
        see(parts->tool_calls[i].arguments.ptr,
            parts->tool_calls[i].arguments.len);
    }
    return 0;
}

static llmcb_step on_token_async(llmcb_task *t, llmcb_handler *h,
                                 const llmcb_event *ev)
{
    LLMCB_BEGIN(t);
    on_token(h, ev);
    LLMCB_END(t);
}

/* One event; `kind` as below, `end` of a line, what is behind the choice. */
static size_t make_event(char *out, size_t size, unsigned kind,
                         const char *colon, const char *end, const char *rest)
{
    static const char *const members[][2] = {
        { "\"content\":\"", "\"" },
        { "\"reasoning_content\":\"", "\"" },
        { "\"tool_calls\":[{\"index\":0,\"function\":{\"arguments\":\"",
          "\"}}]" },
    };
    char text[256] = "", noise[64] = "";
    unsigned most = one_in(3) ? TEXTS : TAME, k;
    size_t n;

    for (k = below(4); k; k--)
        strcat(text, texts[below(most)]);
    if (*rest == 'o')
        snprintf(noise, sizeof noise, ",\"obfuscation\":\"%.*s\"",
                 (int)below(12), "abcdefghijkl");
    snprintf(out, size,
             "%s{\"id\":\"%s\",\"choices\":[{\"index\":%d,\"delta\":{%s%s%s}%s"
             "}]%s}%s%s",
             colon, one_in(15) ? "22" : "1", one_in(20), members[kind][0], text,
             members[kind][1],
             one_in(20)    ? ",\"finish_reason\":\"stop\""
             : *rest != '-' ? ",\"finish_reason\":null"
                            : "",
             noise, end, end);
    n = strlen(out);
    if (one_in(40)) out[below((unsigned)n)] = (char)(below(126) + 1);
    return n;
}

static size_t make_response(char *out, size_t size)
{
    static const char *const ends[] = { "\n", "\r\n", "\r", "\n" };
    static const char *const rests[] = { "-", "f", "o" };
    const char *end = ends[below(4)], *rest = rests[below(3)];
    const char *colon = one_in(8) ? "data:" : "data: ";
    unsigned events = below(12) + 1, each = one_in(3) ? below(4) + 1 : 1, i;
    unsigned usual = one_in(5) ? below(3) : 0;
    bool chunked = one_in(2);
    char piece[8192];
    size_t n, m = 0;

    n = (size_t)snprintf(out, size, "HTTP/1.1 200 OK\r\n"
                         "Content-Type: text/event-stream\r\n%s\r\n",
                         chunked ? "Transfer-Encoding: chunked\r\n" : "");
    for (i = 0; i <= events; i++) {
        if (i < events)
            m += make_event(piece + m, sizeof piece - m,
                            one_in(8) ? below(3) : usual, colon, end, rest);
        else
            m += (size_t)snprintf(piece + m, sizeof piece - m, "%s[DONE]%s%s",
                                  colon, end, end);
        if (i < events && (i + 1) % each) continue;
        if (chunked) n += (size_t)snprintf(out + n, size - n, "%zx\r\n", m);
        memcpy(out + n, piece, m);
        n += m;
        if (chunked) n += (size_t)snprintf(out + n, size - n, "\r\n");
        m = 0;
    }
    if (chunked) n += (size_t)snprintf(out + n, size - n, "0\r\n\r\n");
    return n;
}

static void tell(unsigned seed, llmcb_op *op)
{
    const llmcb_result *r = llmcb_op_result(op);

    printf("%u: %s, tokens %zx", seed, llmcb_op_error(op)->message, seen);
    if (r && r->n_generations) {
        const llmcb_generation *g = &r->generations[0];
        seen = 0;
        see(g->text.ptr, g->text.len + 1);
        printf(", text %zx of %zu, %s", seen, g->text.len,
               g->finish_reason.len ? g->finish_reason.ptr : "no reason");
    }
    printf("\n");
}

static void try_seed(unsigned seed)
{
    static char bytes[1 << 17];
    static const llmcb_message hi = { .content = "hi" };
    llmcb_segment segs[32] = { { 0, 0 } };
    llmcb_recording rec = { .bytes = bytes, .end = LLMCB_REPLAY_CLOSE,
                            .segments = segs };
    llmcb_loop_desc ld = { .virtual_clock = true };
    llmcb_replay_desc rd = { .recordings = &rec, .n_recordings = 1 };
    llmcb_handler h = { .sync = { NULL } }, *list[1] = { &h };
    llmcb_chat_desc d = { .base_url = "http://127.0.0.1/v1", .api_key = "",
                          .model = "m", .streaming = true, .max_retries = -1,
                          .callbacks = list };
    llmcb_loop *loop = llmcb_loop_new(&ld);
    llmcb_chat *chat;
    llmcb_op *op;
    unsigned i;

    state = seed * 7919u + 1;
    seen = 0;
    rec.len = make_response(bytes, sizeof bytes);
    rec.n_segments = one_in(3) ? below(20) + 2 : 1;
    for (i = 1; i < rec.n_segments; i++)
        segs[i].offset =
            segs[i - 1].offset +
            below((unsigned)(1 + 2 * rec.len / rec.n_segments));
    d.transport = llmcb_replay_new(loop, &rd);
    if (one_in(4)) d.limits.text = below(120) + 1;
    if (one_in(6)) d.limits.event = below(120) + 120;
    if (one_in(5)) d.limits.window_events = below(4) + 1;
    i = below(3);
    if (i == 0)
        h.async.on_llm_new_token = on_token_async;
    else
        h.sync.on_llm_new_token = on_token;
    if (i == 1) h.flags = LLMCB_INLINE;
    d.n_callbacks = one_in(12) ? 0 : 1;
    chat = llmcb_chat_new(loop, &d);
    op = llmcb_chat_generate(chat, &hi, 1, NULL);
    llmcb_op_wait(op);
    tell(seed, op);
    llmcb_op_free(op);
    llmcb_chat_free(chat);
    llmcb_loop_free(loop);
}

int main(int argc, char **argv)
{
    unsigned seed, to = argc == 3 ? (unsigned)atoi(argv[2]) : 0;

    for (seed = to ? (unsigned)atoi(argv[1]) : 0; seed < to; seed++)
        try_seed(seed);
    return to ? 0 : 2;
}

/* The whole stack: what the server sends, when, how the connection ends, when
 * the call is cancelled or freed, which handler is slow or fails and which
 * allocation fails all come from the input. The checks are in stack.h.
 *
 * Behind the options the input is a script, one line a step. Its first
 * character says what it is:
 *     :TEXT   as it stands, with CRLF      =TEXT   as it stands
 *     >TEXT   an event with that data      "TEXT   an event with that content
 *     @N      a pause of N times 250 ms    $       a finish reason
 *     ]N      the connection ends as N     .       the next answer
 *
 * An answer that does not begin with : gets a head. */
#include "stack.h"

typedef struct script {
    llmcbi_buf bytes[3];
    llmcb_segment segments[3][64];
} script;

/* A step of the script into answer i. */
static void step(script *c, llmcb_recording *t, size_t i, char kind,
                 llmcb_str s)
{
    static const char head[] = "HTTP/1.1 200 OK\r\n\r\n";
    static const char open[] = "data: {\"choices\":[{\"index\":0,\"delta\":{";
    llmcbi_buf *b = &c->bytes[i];
    int v = s.len && *s.ptr >= '0' && *s.ptr <= '9' ? *s.ptr - '0' : 0;

    if (!b->len && !strchr(":@]", kind)) fuzz_note(b, head, sizeof head - 1);
    switch (kind) {
    case ':':
    case '=': fuzz_note(b, s.ptr, s.len); break;
    case '>': fuzz_note(b, "data: ", 6), fuzz_note(b, s.ptr, s.len); break;
    case '"':
        fuzz_note(b, open, sizeof open - 1);
        fuzz_note(b, "\"content\":\"", 11);
        fuzz_note(b, s.ptr, s.len);
        fuzz_note(b, "\"}}]}", 5);
        break;
    case '$':
        fuzz_note(b, open, sizeof open - 1);
        fuzz_note(b, "},\"finish_reason\":\"stop\"}]}", 27);
        break;
    case '@':
        if (t->n_segments == 64) return;
        if (!t->n_segments) t->n_segments = 1; /* what came before */
        c->segments[i][t->n_segments].offset = b->len;
        c->segments[i][t->n_segments++].delay_ms = 250 * v;
        return;
    case ']': t->end = (llmcb_replay_end)(v % 4); return;
    default: return;
    }
    fuzz_note(b, kind == ':' ? "\r\n" : "\n\n", kind == '=' ? 0 : 2);
}

static void compose(script *c, stack *s, llmcb_str text)
{
    size_t i = 0;

    while (text.len) {
        const char *lf = (const char *)memchr(text.ptr, '\n', text.len);
        size_t n = lf ? (size_t)(lf - text.ptr) : text.len;
        if (n && *text.ptr == '.' && i < 2)
            i++;
        else if (n)
            step(c, &s->tapes[i], i, *text.ptr,
                 fuzz_slice(text.ptr + 1, n - 1));
        if (!lf) break;
        text.ptr += n + 1;
        text.len -= n + 1;
    }
    s->n_tapes = i + 1;
    for (i = 0; i < s->n_tapes; i++) {
        s->tapes[i].bytes = c->bytes[i].ptr ? c->bytes[i].ptr : "";
        s->tapes[i].len = c->bytes[i].len;
        s->tapes[i].segments = c->segments[i];
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_in in = { data, data + size };
    unsigned kind = fuzz_byte(&in), small = fuzz_byte(&in);
    unsigned fail_at = fuzz_byte(&in), cancel = fuzz_byte(&in), i;
    script c = { 0 };
    stack s = { 0 };

    s.cd.streaming = !(kind & 1);
    s.pull = (kind & 6) == 2;
    s.n_prompts = (kind & 6) == 4 ? 2 : 1;
    s.leave = (kind & 6) == 6;
    s.cancel_ms = 100 * (int64_t)cancel;
    s.cd.max_retries = (int)(small & 3) - 1;
    if (small & 4) s.cd.limits.window_events = 2;
    if (small & 8) s.cd.limits.window_bytes = 64;
    if (small & 16) s.cd.limits.text = 20;
    if (small & 32) s.cd.limits.arguments = 4;
    if (small & 64) s.cd.total_ms = 2000;
    if (small & 128) s.cd.handler_ms = 300;
    s.cd.idle_ms = 1500;
    s.cd.first_byte_ms = 1000;
    for (i = 0; i < 3; i++) {
        unsigned how = fuzz_byte(&in), at = fuzz_byte(&in);
        if (i && how < 64) break;
        stack_add(&s, how >> 7);
        s.viewers[i].act = at ? how & 7 : 0;
        s.viewers[i].at = at;
        s.viewers[i].ms = (how >> 3 & 3) * 200;
        if (how & 32) s.viewers[i].h.flags |= LLMCB_RAISE;
        if (how & 64) s.viewers[i].h.flags |= LLMCB_AWAIT_EACH;
    }
    compose(&c, &s, fuzz_rest(&in));
    fuzz_heap_set(fail_at, kind & 8);
    stack_run(&s);
    for (i = 0; i < 3; i++)
        fuzz_drop(&c.bytes[i]);
    stack_drop(&s);
    return 0;
}

/* [WIRE]: the answer of a server, one event a line, comes to the same whether
 * it arrives at once, in pieces or byte by byte; what handlers are told adds
 * up to the result. A line that begins with ! stands as it is. Options:
 * limits, cuts, kind of answer, failing allocation. */
#include "stack.h"

static const char wire_head[] = "HTTP/1.1 200 OK\r\n\r\n";

/* Lines to a stream, or the first line as a whole answer. */
static void wire_compose(llmcbi_buf *b, llmcb_str s, bool stream)
{
    fuzz_note(b, wire_head, sizeof wire_head - 1);
    while (s.len) {
        const char *lf = (const char *)memchr(s.ptr, '\n', s.len);
        size_t n = lf ? (size_t)(lf - s.ptr) : s.len;
        if (!stream) {
            fuzz_note(b, s.ptr, s.len);
            return;
        }
        if (n && *s.ptr == '!') {
            fuzz_note(b, s.ptr + 1, n - 1);
            fuzz_note(b, "\n", 1);
        } else {
            fuzz_note(b, "data: ", 6);
            fuzz_note(b, s.ptr, n);
            fuzz_note(b, "\n\n", 2);
        }
        if (!lf) break;
        s.ptr += n + 1;
        s.len -= n + 1;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_in in = { data, data + size };
    unsigned small = fuzz_byte(&in), cuts = fuzz_byte(&in);
    unsigned kind = fuzz_byte(&in), fail_at = fuzz_byte(&in);
    llmcb_segment *segments;
    llmcbi_buf bytes;
    stack s[4];
    size_t at, n, i;

    memset(&bytes, 0, sizeof bytes);
    wire_compose(&bytes, fuzz_rest(&in), !(kind & 1));
    segments = (llmcb_segment *)calloc(bytes.len + 1, sizeof *segments);
    if (!segments) abort();
    for (i = 0; i < 4; i++) {
        llmcb_recording *t = &s[i].tapes[0];
        llmcb_limits *l = &s[i].cd.limits;
        uint32_t rng = i < 2 ? (uint32_t)i : 2 + cuts * 2654435761u;
        memset(&s[i], 0, sizeof s[i]);
        if (small & 1) l->event = 64 + small;
        if (small & 2) l->text = small >> 3;
        if (small & 4) l->arguments = small >> 3;
        if (small & 8) l->window_events = 2;
        if (small & 16) l->window_bytes = 64;
        s[i].cd.max_retries = -1;
        s[i].cd.n = 1 + (kind >> 4) % 3;
        s[i].cd.streaming = !(kind & 2);
        t->bytes = bytes.ptr;
        t->len = bytes.len;
        t->end = kind & 4 ? LLMCB_REPLAY_RESET : LLMCB_REPLAY_CLOSE;
        for (at = n = 0; at < bytes.len; n++) {
            segments[n].offset = at;
            at += fuzz_cut(&rng, bytes.len - at);
        }
        t->segments = segments;
        t->n_segments = i ? n : 0;
        s[i].n_tapes = s[i].n_prompts = 1;
        stack_add(&s[i], i == 2);
        fuzz_heap_set(i == 3 ? fail_at : 0, kind & 8);
        stack_run(&s[i]);
        if (i < 3 || !fail_at) FUZZ_CHECK(fuzz_same(&s[i].log, &s[0].log));
        if (i < 3)
            FUZZ_CHECK(fuzz_same(&s[i].viewers[0].views[0].text[0],
                                 &s[0].viewers[0].views[0].text[0]));
    }
    for (i = 0; i < 4; i++)
        stack_drop(&s[i]);
    free(segments);
    fuzz_drop(&bytes);
    return 0;
}

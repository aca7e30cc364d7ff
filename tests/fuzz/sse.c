/* [SSE]: the stream in one piece, in pieces and byte by byte gives the same
 * events, and those of a second decoder. Options: limit, cuts, failing
 * allocation. */
#include "fuzz.h"

/* As the HTML standard has it, without any limit. */
static void reference(llmcbi_buf *log, llmcb_str s)
{
    llmcbi_buf data;
    size_t i = 0;
    bool any = false, error = false;

    memset(&data, 0, sizeof data);
    if (s.len >= 3 && memcmp(s.ptr, "\xEF\xBB\xBF", 3) == 0) i = 3;
    for (;;) {
        size_t eol = i, name, value;
        while (eol < s.len && s.ptr[eol] != '\n' && s.ptr[eol] != '\r')
            eol++;
        if (eol == s.len) break;
        for (name = i; name < eol && s.ptr[name] != ':';)
            name++;
        value = name < eol ? name + 1 : name;
        if (value < eol && s.ptr[value] == ' ') value++;
        if (eol == i) {
            if (data.len) {
                fuzz_note(log, error ? "e" : "d", 1);
                fuzz_note_str(log, llmcbi_buf_str(&data));
            }
            data.len = 0;
            any = error = false;
        } else if (name - i == 4 && memcmp(s.ptr + i, "data", 4) == 0) {
            if (any) fuzz_note(&data, "\n", 1);
            fuzz_note(&data, s.ptr + value, eol - value);
            any = true;
        } else if (name - i == 5 && memcmp(s.ptr + i, "event", 5) == 0) {
            error = eol - value == 5 && !memcmp(s.ptr + value, "error", 5);
        }
        i = eol + 1;
        if (s.ptr[eol] == '\r' && i < s.len && s.ptr[i] == '\n') i++;
    }
    fuzz_drop(&data);
}

static llmcbi_sse_status decode_events(llmcbi_buf *log, llmcb_str s,
                                       size_t limit, uint32_t rng)
{
    llmcbi_sse_status status = LLMCBI_SSE_MORE;
    llmcbi_sse sse;

    memset(&sse, 0, sizeof sse);
    sse.limit = limit;
    while (s.len && status == LLMCBI_SSE_MORE) {
        size_t n = fuzz_cut(&rng, s.len);
        char *piece = fuzz_copy(s.ptr, n);
        const char *p = piece;
        llmcb_str event;
        while ((status = llmcbi_sse_next(&fuzz_alloc, &sse, &p, piece + n,
                                         &event)) == LLMCBI_SSE_EVENT) {
            FUZZ_CHECK(event.len && event.len <= limit);
            fuzz_note(log, sse.is_error ? "e" : "d", 1);
            fuzz_note_str(log, event);
        }
        FUZZ_CHECK(status != LLMCBI_SSE_MORE || p == piece + n);
        free(piece);
        s.ptr += n;
        s.len -= n;
    }
    llmcbi_sse_free(&fuzz_alloc, &sse);
    FUZZ_CHECK(fuzz_heap.live == 0);
    return status;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_in in = { data, data + size };
    unsigned small = fuzz_byte(&in), cuts = fuzz_byte(&in);
    unsigned fail_at = fuzz_byte(&in);
    size_t limit = small ? small : SIZE_MAX / 4;
    llmcb_str s = fuzz_rest(&in);
    llmcbi_buf logs[5];
    llmcbi_sse_status status[4];
    int i;

    memset(logs, 0, sizeof logs);
    for (i = 0; i < 4; i++) {
        fuzz_heap_set(i == 3 ? fail_at : 0, cuts & 1);
        status[i] =
            decode_events(&logs[i], s, limit,
                          i < 2 ? (uint32_t)i : 2 + cuts * 2654435761u);
        if (i < 3) FUZZ_CHECK(status[i] == status[0]);
        if (i < 3) FUZZ_CHECK(fuzz_same(&logs[i], &logs[0]));
    }
    reference(&logs[4], s);
    FUZZ_CHECK(status[0] == LLMCBI_SSE_MORE ||
               (small && status[0] == LLMCBI_SSE_LIMIT));
    FUZZ_CHECK(status[3] == status[0] || status[3] == LLMCBI_SSE_NOMEM);
    if (!small) FUZZ_CHECK(fuzz_same(&logs[0], &logs[4]));
    for (i = 0; i < 5; i++) { /* one that ends early has begun as well */
        FUZZ_CHECK(logs[i].len <= logs[4].len);
        if (logs[i].len)
            FUZZ_CHECK(!memcmp(logs[i].ptr, logs[4].ptr, logs[i].len));
    }
    for (i = 0; i < 5; i++)
        fuzz_drop(&logs[i]);
    return 0;
}

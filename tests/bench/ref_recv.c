/* The limit: reads the bytes of all streams and looks at none but the last,
 * to know the end. It has no text, so its checksum is 0; its tokens are what
 * it asked for, and for the marks they are told from the bytes. */
#include "gen.h"
#include "ref.h"

static uint64_t bytes_a_token;

static int ref_take(ref_stream *s, char *bytes, size_t len)
{
    static const char end[] = "\r\n0\r\n\r\n";

    bench_progress(bench.wire / bytes_a_token);
    if (len >= 7) {
        memcpy(s->tail, bytes + len - 7, 7);
        s->tail_len = 7;
    } else {
        size_t keep = s->tail_len + len > 7 ? 7 - len : s->tail_len;
        memmove(s->tail, s->tail + s->tail_len - keep, keep);
        memcpy(s->tail + keep, bytes, len);
        s->tail_len = (uint32_t)(keep + len);
    }
    return s->tail_len == 7 && memcmp(s->tail, end, 7) == 0;
}

static void ref_done(ref_stream *s)
{
    (void)s;
    bench.tokens += ref.tokens;
}

int main(int argc, char **argv)
{
    gen g;

    gen_init(&g, 0, GEN_CONTENT);
    bytes_a_token = g.at[GEN_RING] / GEN_RING;
    free(g.bytes);
    free(g.at);
    return ref_main(argc, argv, "recv");
}

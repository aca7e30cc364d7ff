/* [JSON]: the reader. One step from any state that it can be in, whatever
 * came before: at any depth, with at most N bytes to come. */
/* reached: 95 */
/* eva: -eva-widening-delay 60 */
/* eva: -eva-slevel-function llmcbi_json_close:10,llmcbi_json_value:20 */
/* eva: -eva-slevel-function llmcbi_json_raw:30,llmcbi_json_next:30 */
#include "proof.h"
#define N 10

/* Depth and state belong together, too: hints has assertions on that. */
static void good(const llmcbi_json *j)
{
    /*@ assert place: j->p <= j->end; */
    /*@ assert deep: j->depth <= 128; */
    /*@ assert state: j->expect <= LLMCBI_EXPECT_END; */
}

static llmcbi_json any_state(int n, int expect)
{
    llmcbi_json j;

    llmcbi_json_init(&j, any_bytes(n), n);
    Frama_C_make_unknown((char *)j.is_object, sizeof j.is_object);
    j.expect = (uint8_t)expect;
    j.depth = Frama_C_unsigned_int_interval(
        expect != LLMCBI_EXPECT_VALUE && expect != LLMCBI_EXPECT_END,
        expect == LLMCBI_EXPECT_END ? 0 : LLMCBI_JSON_DEPTH);
    j.too_deep = any_bool();
    return j;
}

static void step(void)
{
    int n = Frama_C_interval(0, N), expect = Frama_C_interval(0, 4);
    llmcbi_json_type type;
    llmcbi_json j;
    int64_t v;

    /*@ split n; */
    /*@ split expect; */
    j = any_state(n, expect);
    type = llmcbi_json_next(&j);
    good(&j);
}

static void skip(void)
{
    int n = Frama_C_interval(0, N / 2), expect = Frama_C_interval(1, 3);
    llmcbi_json j;

    /*@ split n; */
    /*@ split expect; */
    j = any_state(n, expect);
    llmcbi_json_skip(&j, LLMCBI_JSON_OBJECT);
    good(&j);
}

static void raw(void)
{
    int n = Frama_C_interval(0, N / 2), expect = Frama_C_interval(0, 3);
    llmcbi_json j;

    /*@ split n; */
    /*@ split expect; */
    j = any_state(n, expect);
    llmcbi_json_raw(&j);
    good(&j);
}

static void numbers(void)
{
    int n = Frama_C_interval(0, 20);
    llmcbi_json j;
    int64_t v;

    /*@ split n; */
    memset(&j, 0, sizeof j);
    j.str = any_bytes(n);
    j.len = n;
    llmcbi_json_int(&j, &v);
}

int main(void)
{
    switch (WHICH(3)) {
    case 0: step(); break;
    case 1: skip(); break;
    case 2: raw(); break;
    default: numbers(); break;
    }
    return 0;
}

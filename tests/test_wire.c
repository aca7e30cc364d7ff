/* [WIRE]: what servers send, read through the public interface from
 * recordings in memory, and what is sent to them, caught by a transport that
 * sends nothing.
 *
 * In tables ' stands for the quotation mark, so that JSON can be read. */
/* build: -DLLMCB_NO_AGENT -DLLMCB_NO_SOCKETS */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE /* mmap with MAP_ANONYMOUS */
#endif
#define LLMCB_IMPLEMENTATION
#define LLMCB_NO_CURL
#include "../llmcb.h"
#include "test.h"
#include <sys/mman.h>

static char *quoted(const char *s)
{
    char *copy = malloc(strlen(s) + 1), *p = strcpy(copy, s);

    while ((p = strchr(p, '\'')) != NULL) *p = '"';
    return copy;
}

/* ---- asking a recording --------------------------------------------------*/

#define HEAD "HTTP/1.1 200 OK\r\n\r\n"

/* What a call came to, in one line:
 *
 *     CODE text refusal reasoning finish logprobs {id name arguments} usage
 *     model id fingerprint
 *
 * with "valid" or "bad" behind the arguments. Unset parts are left out. */
typedef struct answer {
    char line[4000];
    llmcb_error error;
    /* of the first choice, joined from the events */
    llmcbi_buf text, arguments[4];
    size_t lengths[4]; /* of the latter */
    bool dirty;  /* some text was not UTF-8 */
    int tokens;
} answer;

static const llmcb_allocator plain = { llmcbi_default_resize, NULL };

static void check_text(answer *a, llmcb_str s)
{
    if (!llmcbi_utf8_valid(s.ptr, s.len) || s.ptr[s.len] != '\0')
        a->dirty = true;
}

static int on_token(llmcb_handler *h, const llmcb_event *ev)
{
    answer *a = h->user;
    const llmcb_parts *parts = ev->token->parts;

    a->tokens++;
    check_text(a, ev->token->text);
    check_text(a, parts->refusal);
    check_text(a, parts->reasoning);
    check_text(a, parts->finish_reason);
    check_text(a, parts->logprobs);
    if (ev->token->choice == 0)
        llmcbi_buf_add(&plain, &a->text, ev->token->text.ptr,
                       ev->token->text.len);
    for (size_t i = 0; i < parts->n_tool_calls; i++) {
        const llmcb_tool_delta *d = &parts->tool_calls[i];
        check_text(a, d->id);
        check_text(a, d->name);
        check_text(a, d->arguments);
        if (ev->token->choice == 0 && d->index < 4)
            llmcbi_buf_add(&plain, &a->arguments[d->index], d->arguments.ptr,
                           d->arguments.len);
    }
    return 0;
}

/* As much of s as a line can do with. */
static char *show(char *p, const char *before, llmcb_str s)
{
    return p + sprintf(p, "%s%.*s", before, (int)(s.len < 300 ? s.len : 300),
                       s.ptr);
}

static char *show_set(char *p, const char *before, llmcb_str s)
{
    return s.len ? show(p, before, s) : p;
}

/* The result as a line, and whether it is what the events said. */
static void describe(answer *a, const llmcb_result *r, bool streaming)
{
    char *p = a->line;

    p += sprintf(p, "%s", llmcb_code_name(a->error.code) + 6);
    for (size_t i = 0; i < r->n_generations; i++) {
        const llmcb_generation *g = &r->generations[i];
        p += sprintf(p, "%s", i ? " |" : "");
        p = show_set(p, " ", g->text);
        p = show_set(p, " refusal=", g->refusal);
        p = show_set(p, " reasoning=", g->reasoning);
        p = show_set(p, " finish=", g->finish_reason);
        p = show_set(p, " logprobs=", g->logprobs);
        check_text(a, g->text);
        check_text(a, g->logprobs);
        for (size_t k = 0; k < g->n_tool_calls; k++) {
            const llmcb_tool_call *c = &g->tool_calls[k];
            if (p - a->line < 2000) {
                p = show(p, " {", c->id);
                p = show(p, " ", c->name);
                p = show(p, " ", c->arguments);
                p += sprintf(p, c->valid ? " valid}" : " bad}");
            }
            check_text(a, c->id);
            check_text(a, c->name);
            check_text(a, c->arguments);
            if (i || k >= 4 || !streaming) continue;
            CHECK(c->arguments.len == a->arguments[k].len &&
                  (!c->arguments.len || !memcmp(c->arguments.ptr,
                                                a->arguments[k].ptr,
                                                c->arguments.len)));
        }
        if (i || !streaming) continue;
        CHECK(g->text.len == a->text.len &&
              (!g->text.len ||
               !memcmp(g->text.ptr, a->text.ptr, g->text.len)));
    }
    if (r->usage.known)
        p += sprintf(p, " usage=%lld+%lld=%lld,%lld,%lld",
                     (long long)r->usage.input_tokens,
                     (long long)r->usage.output_tokens,
                     (long long)r->usage.total_tokens,
                     (long long)r->usage.cached_tokens,
                     (long long)r->usage.reasoning_tokens);
    p = show_set(p, " model=", r->model_name);
    p = show_set(p, " id=", r->id);
    show_set(p, " fingerprint=", r->system_fingerprint);
    check_text(a, r->model_name);
    check_text(a, r->id);
    check_text(a, r->system_fingerprint);
}

/* Plays a response, whole or one byte at a time. */
static answer ask(const char *bytes, size_t n, llmcb_replay_end end,
                  bool streaming, bool trickle)
{
    answer a;
    llmcb_recording rec;
    llmcb_segment *segments = calloc(n + 1, sizeof *segments);
    llmcb_loop *loop;
    llmcb_chat *chat;
    llmcb_op *op;
    llmcb_handler h;
    llmcb_handler *handlers[1];
    llmcb_loop_desc ld;
    llmcb_replay_desc rd;
    llmcb_chat_desc cd;
    llmcb_message m;

    memset(&a, 0, sizeof a);
    memset(&rec, 0, sizeof rec);
    memset(&h, 0, sizeof h);
    memset(&ld, 0, sizeof ld);
    memset(&rd, 0, sizeof rd);
    memset(&cd, 0, sizeof cd);
    memset(&m, 0, sizeof m);
    for (size_t i = 0; i < n; i++) segments[i].offset = i;
    rec.bytes = bytes;
    rec.len = n;
    rec.segments = segments;
    rec.n_segments = trickle ? n : 0;
    rec.end = end;
    rd.recordings = &rec;
    rd.n_recordings = 1;
    ld.virtual_clock = true;
    h.sync.on_llm_new_token = on_token;
    h.flags = LLMCB_INLINE;
    h.user = &a;
    handlers[0] = &h;
    cd.base_url = "http://localhost/v1";
    cd.api_key = "";
    cd.max_retries = -1;
    cd.streaming = streaming;
    cd.callbacks = handlers;
    cd.n_callbacks = 1;
    m.content = "?";
    loop = llmcb_loop_new(&ld);
    cd.transport = llmcb_replay_new(loop, &rd);
    chat = llmcb_chat_new(loop, &cd);
    op = llmcb_chat_generate(chat, &m, 1, NULL);
    llmcb_op_wait(op);
    a.error = *llmcb_op_error(op);
    describe(&a, llmcb_op_result(op), streaming);
    CHECK(!a.dirty);
    llmcb_op_free(op);
    llmcb_chat_free(chat);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    free(segments);
    llmcbi_buf_free(&plain, &a.text);
    for (int i = 0; i < 4; i++) {
        a.lengths[i] = a.arguments[i].len;
        llmcbi_buf_free(&plain, &a.arguments[i]);
    }
    return a;
}

/* A stream of the events that stand in the lines of s, with [DONE] behind
 * them. In a line that begins with ! all is sent as it stands. */
static char *stream_of(const char *s)
{
    char *json = quoted(s), *out = malloc(8 * strlen(s) + 200), *p = out;

    p += sprintf(p, HEAD);
    for (char *line = strtok(json, "\n"); line; line = strtok(NULL, "\n"))
        p += *line == '!' ? sprintf(p, "%s\n", line + 1)
                          : sprintf(p, "data: %s\n\n", line);
    sprintf(p, "data: [DONE]\n\n");
    free(json);
    return out;
}

typedef struct row {
    const char *events, *want;
} row;

static void check_rows(const row *rows, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        char *bytes = stream_of(rows[i].events), *want = quoted(rows[i].want);
        for (int trickle = 0; trickle < 2; trickle++) {
            answer a = ask(bytes, strlen(bytes), LLMCB_REPLAY_CLOSE, true,
                           trickle);
            if (strcmp(a.line, want) != 0)
                TEST_FAIL("%s:\n    %s, not\n    %s", rows[i].events, a.line,
                          want);
        }
        free(bytes);
        free(want);
    }
}

#define ROWS(rows) check_rows(rows, sizeof(rows) / sizeof *(rows))

#define DELTA(members) "{'choices':[{'index':0,'delta':{" members "}}]}\n"
#define TEXT(text) DELTA("'content':'" text "'")
#define STOP "{'choices':[{'index':0,'delta':{},'finish_reason':'stop'}]}\n"

/* ---- text ----------------------------------------------------------------*/

TEST(text_comes_from_wherever_servers_put_it)
{
    static const row rows[] = {
        { DELTA("'role':'assistant','content':''") TEXT("a") TEXT("b") STOP,
          "OK ab finish=stop" },
        { TEXT("no role"), "OK no role" },
        { DELTA("'content':null") TEXT("a"), "OK a" },
        { DELTA("'content':5") DELTA("'content':['x']")
              DELTA("'content':{'content':'y'}") DELTA("'content':true")
                  TEXT("a"),
          "OK a" },
        { DELTA("") TEXT("a"), "OK a" },
        { "{'choices':[{'index':0,'delta':null}]}\n" TEXT("a"), "OK a" },
        { "{'choices':[{'index':0}]}\n" TEXT("a"), "OK a" },
        { "{'choices':[{'index':0,'delta':[]}]}\n" TEXT("a"), "OK a" },
        { "{'choices':[{'index':0,'delta':'x'}]}\n" TEXT("a"), "OK a" },
        { "{'choices':[],'prompt_filter_results':[{'a':[1,{}]}]}\n" TEXT("a"),
          "OK a" },
        { "{'choices':null}\n{}\n{'choices':{}}\n{'choices':'x'}\n"
          "{'choices':[null,1,'x',[[]],true]}\n" TEXT("a"),
          "OK a" },
        { "{'choices':[null,{'index':0,'delta':{'content':'a'}}]}\n",
          "OK a" },
        { "{'choices':[{'delta':{'content':'no index'}}]}\n", "OK no index" },
        { "{'choices':[{'index':null,'delta':{'content':'a'}},"
          "{'index':'0','delta':{'content':'b'}},"
          "{'index':-1,'delta':{'content':'c'}},"
          "{'index':0.5,'delta':{'content':'d'}}]}\n",
          "OK abcd" },
        { "{'choices':[{'index':2,'delta':{'content':'c'}},"
          "{'index':0,'delta':{'content':'a'}}]}\n"
          "{'choices':[{'index':1,'delta':{'content':'b'}}]}\n"
          "{'choices':[{'index':2,'delta':{'content':'C'}}]}\n",
          "OK a | b | cC" },
        { "{'choices':[{'index':0,'message':{'content':'whole'}}]}\n",
          "OK whole" },
        { "{'model':'m','delta':{'content':'x'},'content':'y','choices':"
          "[{'text':'z','delta':{'x':{'content':'q'},'content':'a'}}]}\n",
          "OK a model=m" },
        /* the last of equal keys counts */
        { DELTA("'content':'x','content':'a'"), "OK a" },
        { DELTA("'content':'x','content':null") TEXT("a"), "OK a" },
        { "{'cho\\u0069ces':[{'d\\u0065lta':{'\\u0063ontent':'a'}}]}\n",
          "OK a" },
        { DELTA("'refusal':'No'") DELTA("'refusal':' way'") DELTA(
              "'refusal':null"),
          "OK refusal=No way" },
        { DELTA("'reasoning_content':'hm'") DELTA("'reasoning':' so'") DELTA(
              "'reasoning':null,'reasoning_content':null") TEXT("a"),
          "OK a reasoning=hm so" },
        { DELTA("'reasoning':'hm','reasoning_content':'hm'")
              DELTA("'reasoning':'so','reasoning_content':null") TEXT("a"),
          "OK a reasoning=hmso" },
        { "{'choices':[{'delta':{'content':'a'},'logprobs':{'content':[1]}}]}"
          "\n{'choices':[{'delta':{'content':'b'},'logprobs':null}]}\n"
          "{'choices':[{'delta':{'content':'c'},'logprobs':{}}]}\n",
          "OK abc logprobs=[{'content':[1]},{}]" },
    };

    ROWS(rows);
}

#define THINK(text) DELTA("'content':null,'reasoning':'" text "'")
#define CALL(text)                                                        \
    DELTA("'tool_calls':[{'index':0,'id':'c','type':'function','function'" \
          ":{'name':'f','arguments':'" text "'}}]")
#define ARGS(index, text)                                 \
    DELTA("'tool_calls':[{'index':" index ",'function':{" \
          "'arguments':'" text "'}}]")

/* Events that differ in one string alone are read in a shorter way: these look
 * like it. */
TEST(an_event_like_the_one_before_is_read_no_differently)
{
    static const row rows[] = {
        { TEXT("a") TEXT("b") TEXT("") TEXT("c\\n") TEXT("\\'") TEXT("d"),
          "OK abc\n'd" },
        { TEXT("a") DELTA("'content':'b','refusal':'x'") TEXT("c"),
          "OK abc refusal=x" },
        { TEXT("a") DELTA("'content':'b','content':'c'") TEXT("d"),
          "OK acd" },
        { TEXT("a") DELTA("'content':'b'},'delta':{'refusal':'x'"),
          "OK ab refusal=x" },
        { TEXT("a") TEXT("b\\"), "EJSON a" },
        { TEXT("a") TEXT("b\\x"), "EJSON a" },
        { TEXT("a") TEXT("b\t"), "EJSON a" },
        { TEXT("a") TEXT("b'"), "EJSON a" },
        { TEXT("a") TEXT("b','x"), "EJSON a" },
        { TEXT("a") DELTA("'content':'b'},'error':{'x':'y'") TEXT("c"),
          "OK abc" },
        { TEXT("a") "{'choices':[{'index':0,'delta':{'content':'b'}}],"
                    "'usage':{'prompt_tokens':1}}\n" TEXT("c"),
          "OK abc usage=1+0=1,0,0" },
        { TEXT("a") "{'choices':[{'index':1,'delta':{'content':'b'}}]}\n"
              "{'choices':[{'index':1,'delta':{'content':'c'}}]}\n" TEXT("d"),
          "OK ad | bc" },
        { TEXT("\\ud83d") TEXT("\\ude00") TEXT("b"),
          "OK \xF0\x9F\x98\x80"
          "b" },
        { DELTA("'content':null") DELTA("'content':null") TEXT("a"), "OK a" },
        { "{'x':'data','choices':[{'index':0,'delta':{'content':'a'}}],"
          "'y':'z'}\n"
          "{'x':'data','choices':[{'index':0,'delta':{'content':'b'}}],"
          "'y':'w'}\n",
          "OK ab" },
        /* reasoning */
        { THINK("a") THINK("b") THINK("") THINK("\\n") TEXT("c") THINK("d")
              THINK("e") TEXT("f"),
          "OK cf reasoning=ab\nde" },
        { DELTA("'content':'','reasoning':'a'")
              DELTA("'content':'','reasoning':'b'")
                  DELTA("'content':'c','reasoning':''")
                      DELTA("'content':'','reasoning':'d'"),
          "OK c reasoning=abd" },
        { DELTA("'content':'a','reasoning':'x'")
              DELTA("'content':'b','reasoning':'x'")
                  DELTA("'content':'b','reasoning':'y'"),
          "OK abb reasoning=xxy" },
        { THINK("a") DELTA("'content':null,'reasoning':'b','refusal':'x'")
              THINK("c") THINK("d"),
          "OK refusal=x reasoning=abcd" },
        { THINK("a") THINK("b','reasoning':'c") THINK("d"),
          "OK reasoning=acd" },
        /* an empty one changes nothing */
        { DELTA("'reasoning_content':'x','reasoning':'a'")
              DELTA("'reasoning_content':'x','reasoning':''")
                  DELTA("'reasoning_content':'x','reasoning':'b'"),
          "OK reasoning=axb" },
        /* of one length, with blanks, and so of one look but for its own */
        { DELTA("'reasoning':'a'") DELTA("'reasoning':'b'")
              DELTA("  'content':'c'") DELTA("  'content':'d'"),
          "OK cd reasoning=ab" },
        { THINK("\\ud83d") THINK("\\ude00") THINK("\\u00e9"),
          "OK reasoning=\xF0\x9F\x98\x80\xC3\xA9" },
        { THINK("\xE4") THINK("\xBD") THINK("\xA0"),
          "OK reasoning=\xE4\xBD\xA0" },
        { THINK("a") THINK("b\\x"), "EJSON reasoning=a" },
        /* the arguments of a tool call */
        { CALL("") ARGS("0", "{") ARGS("0", "\\'a\\':") ARGS("0", "1")
              ARGS("0", "}"),
          "OK {c f {'a':1} valid}" },
        { CALL("{") ARGS("0", "}") ARGS("1", "[") ARGS("1", "]")
              ARGS("0", " ") TEXT("a") ARGS("0", " "),
          "OK a {c f {}   valid} {  [] bad}" },
        { CALL("{") ARGS("0", "\\'\\ud83d") ARGS("0", "\\ude00\\'")
              ARGS("0", ":1}"),
          "OK {c f {'\xF0\x9F\x98\x80':1} valid}" },
        { CALL("{") ARGS("0", "") ARGS("0", "}','x':'y") ARGS("0", " "),
          "OK {c f {}  valid}" },
        { CALL("{") ARGS("0", "") ARGS("0", "}'}},{'index':1,'function':{"
              "'name':'g','arguments':'{}") ARGS("0", " "),
          "OK {c f {}  valid} { g {} valid}" },
        { CALL("{") ARGS("0", "") DELTA("'content':'t','tool_calls':[{'index':"
              "0,'function':{'arguments':'}'}}]") ARGS("0", " ") ARGS("0", " "),
          "OK t {c f {}   valid}" },
        { CALL("{") DELTA("'tool_calls':[{'index':0,'function':{'arguments':"
              "{}}}]") DELTA("'tool_calls':[{'index':0,'function':{"
              "'arguments':null}}]") DELTA("'tool_calls':[{'index':0}]")
              ARGS("0", "}") ARGS("0", " "),
          "OK {c f {}  valid}" },
        { CALL("") ARGS("0", "1") ARGS("0", "2")
              DELTA("'tool_calls':[ {'index':0,'function':{'arguments':'3'}}]")
                  DELTA("'tool_calls':[ {'index':0,'function':{'arguments':"
                        "'4'}}]")
                      DELTA(" 'tool_calls':[{'index':0,'function':{'arguments':"
                            "'5'}}]")
                          DELTA(" 'tool_calls':[{'index':0,'function':{"
                                "'arguments':'6'}}]"),
          "OK {c f 123456 bad}" },
        { CALL("") ARGS("0", "a") ARGS("0", "b\\"), "EJSON {c f a bad}" },
    };

    ROWS(rows);
}

#define FFFD "\xEF\xBF\xBD"

TEST(characters_split_over_events_are_put_together)
{
    static const row rows[] = {
        { TEXT("\\u00e9\\n\\/\\\\"), "OK \xC3\xA9\n/\\" },
        { TEXT("a\\ud83d") TEXT("\\ude00b"), "OK a\xF0\x9F\x98\x80"
                                             "b" },
        { TEXT("a\\ud83d") TEXT("") TEXT("\\ude00b"), "OK a\xF0\x9F\x98\x80"
                                                      "b" },
        { TEXT("a\\ud83d") DELTA("'content':null") TEXT("\\ude00b"),
          "OK a\xF0\x9F\x98\x80"
          "b" },
        { TEXT("a\xF0\x9F") TEXT("\x98\x80"
                                 "b"),
          "OK a\xF0\x9F\x98\x80"
          "b" },
        { TEXT("\xF0") TEXT("\x9F") TEXT("\x98") TEXT("\x80"),
          "OK \xF0\x9F\x98\x80" },
        { TEXT("\\ud83d") TEXT("b"), "OK " FFFD "b" },
        { TEXT("\xE2\x82") TEXT("b"), "OK " FFFD "b" },
        { TEXT("a\\ud83d"), "OK a" FFFD },
        { TEXT("a\xE2\x82"), "OK a" FFFD },
        { TEXT("\\ude00") TEXT("\xFF"), "OK " FFFD FFFD },
        { DELTA("'reasoning':'\\ud83d'") DELTA("'reasoning':'\\ude00'"),
          "OK reasoning=\xF0\x9F\x98\x80" },
        { DELTA("'refusal':'\xC3'") DELTA("'refusal':'\xA9'"),
          "OK refusal=\xC3\xA9" },
        { "{'choices':[{'index':0,'delta':{'content':'\\ud83d'}},"
          "{'index':1,'delta':{'content':'x'}}]}\n" TEXT("\\ude00"),
          "OK \xF0\x9F\x98\x80 | x" },
    };

    ROWS(rows);
}

TEST(the_first_finish_reason_stays)
{
    static const row rows[] = {
        { TEXT("a") STOP, "OK a finish=stop" },
        { "{'choices':[{'delta':{'content':'a'},'finish_reason':'length'}]}\n",
          "OK a finish=length" },
        { "{'choices':[{'delta':{'content':'a'},'finish_reason':null}]}\n",
          "OK a" },
        { "{'choices':[{'delta':{'content':'a'},'finish_reason':''}]}\n",
          "OK a" },
        { STOP TEXT("late")
          "{'choices':[{'delta':{},'finish_reason':'length'}]}\n",
          "OK late finish=stop" },
        { STOP STOP STOP, "OK finish=stop" },
        { "{'choices':[{'finish_reason':'content_filter'}]}\n",
          "OK finish=content_filter" },
        { "{'choices':[{'delta':null,'finish_reason':'stop'}]}\n",
          "OK finish=stop" },
        { "{'choices':[{'delta':{'content':'a'},'finish_reason':5}]}\n",
          "OK a" },
    };

    ROWS(rows);
}

TEST(usage_is_taken_as_it_comes)
{
#define USAGE(members) TEXT("a") "{'choices':[],'usage':" members "}\n"
    static const row rows[] = {
        { USAGE("{'prompt_tokens':1,'completion_tokens':2,'total_tokens':3}"),
          "OK a usage=1+2=3,0,0" },
        { USAGE("{'prompt_tokens':1,'completion_tokens':2,'total_tokens':9}"),
          "OK a usage=1+2=9,0,0" },
        { USAGE("null"), "OK a" },
        { USAGE("5"), "OK a" },
        { USAGE("[1]"), "OK a" },
        { USAGE("{}"), "OK a usage=0+0=0,0,0" },
        { USAGE("{'prompt_tokens':4}"), "OK a usage=4+0=4,0,0" },
        { USAGE("{'prompt_tokens':-4,'completion_tokens':null,"
                "'total_tokens':'9'}"),
          "OK a usage=0+0=0,0,0" },
        { USAGE("{'prompt_tokens':1.5,'completion_tokens':1e3,"
                "'total_tokens':99999999999999999999}"),
          "OK a usage=0+0=0,0,0" },
        { USAGE("{'prompt_tokens':9,'completion_tokens':8,"
                "'prompt_tokens_details':{'x':{'cached_tokens':1},"
                "'cached_tokens':5},'completion_tokens_details':"
                "{'reasoning_tokens':3}}"),
          "OK a usage=9+8=17,5,3" },
        { USAGE("{'prompt_tokens':9,'prompt_tokens_details':null,"
                "'completion_tokens_details':[3]}"),
          "OK a usage=9+0=9,0,0" },
        { USAGE("{'prompt_tokens':{'completion_tokens':5},"
                "'completion_tokens':[{'total_tokens':4}],'total_tokens':9}"),
          "OK a usage=0+0=9,0,0" },
        /* on every chunk, and before the text: the last one counts */
        { USAGE("{'prompt_tokens':1,'total_tokens':5},"
                "'usage':{'completion_tokens':2}"),
          "OK a usage=0+2=2,0,0" },
        { "{'choices':[{'delta':{'content':'a'}}],'usage':"
          "{'prompt_tokens':1,'completion_tokens':1}}\n"
          "{'choices':[{'delta':{'content':'b'}}],'usage':"
          "{'prompt_tokens':1,'completion_tokens':2}}\n",
          "OK ab usage=1+2=3,0,0" },
        { "{'choices':[],'usage':{'prompt_tokens':7}}\n" TEXT("a"),
          "OK a usage=7+0=7,0,0" },
        { USAGE("{'prompt_tokens':1}") "{'choices':[],'usage':null}\n",
          "OK a usage=1+0=1,0,0" },
    };

    ROWS(rows);
}

TEST(the_first_names_of_an_answer_stay)
{
    static const row rows[] = {
        { "{'id':'i','model':'m','system_fingerprint':'f'}\n" TEXT("a"),
          "OK a model=m id=i fingerprint=f" },
        { "{'id':'','model':null,'system_fingerprint':5}\n" TEXT("a")
          "{'id':'i\\u00e9','model':'m\\/n'}\n{'id':'j','model':'o'}\n",
          "OK a model=m/n id=i\xC3\xA9" },
    };

    ROWS(rows);
}

TEST(errors_in_a_stream_are_told)
{
    static const row rows[] = {
        { TEXT("a") "{'error':{'message':'Bad','type':'t','code':'c'}}\n",
          "EAPI a" },
        { TEXT("a") "{'error':'text'}\n", "EAPI a" },
        { TEXT("a") "{'error':{}}\n", "EAPI a" },
        { "{'error':null,'choices':[{'delta':{'content':'a'}}]}\n", "OK a" },
        { "{'error':false}\n{'error':[]}\n" TEXT("a"), "OK a" },
        { TEXT("a") "!event: error\n!data: {'message':'Bad'}\n!\n"
              TEXT("never"),
          "EAPI a" },
        { TEXT("a") "!event: error\n!data: overloaded\n!\n", "EAPI a" },
        { TEXT("a") "{'choices':\n" TEXT("never"), "EJSON a" },
        { TEXT("a") "{'choices':[]}}\n", "EJSON a" },
        { TEXT("a") "[]\n", "EJSON a" },
        { TEXT("a") "null\n", "EJSON a" },
        { TEXT("a") "[DONE]x\n", "EJSON a" },
        { TEXT("a") "!data:  [DONE]\n!\n", "EJSON a" },
        { TEXT("a") "[done]\n", "EJSON a" },
        { TEXT("a") "!data:[DONE]\n!\n" TEXT("never") "rubbish\n", "OK a" },
        { TEXT("a") "{'choices':[{'delta':{'content':'b'}}\n", "EJSON a" },
        { TEXT("a") "{'choices':[{'delta':{'content':'b\t'}}]}\n", "EJSON a" },
        { "{'choices':[{'index':128,'delta':{'content':'a'}}]}\n", "ELIMIT" },
        { "{'choices':[{'index':4294967295,'delta':{'content':'a'}}]}\n",
          "ELIMIT" },
    };

    ROWS(rows);
}

/* The error that the first n bytes of a body tell of. */
static llmcb_error error_of(const char *s, size_t n)
{
    char *json = quoted(s), *exact = malloc(n ? n : 1);
    llmcb_error e;

    memcpy(exact, json, n);
    llmcbi_error_set(&e, LLMCB_EAPI, "x");
    llmcbi_wire_error(&e, exact, n);
    free(exact);
    free(json);
    return e;
}

TEST(what_a_provider_says_of_an_error_is_kept)
{
    static const struct {
        const char *json, *message, *type, *code;
    } rows[] = {
        { "{'error':{'message':'Bad','type':'t','code':'c','param':null}}",
          "x: Bad", "t", "c" },
        { "{'message':'Bad','type':'t','code':429}", "x: Bad", "t", "429" },
        { "{'error':'text'}", "x: text", "", "" },
        { "'text'", "x: text", "", "" },
        { "{'error':{'code':null,'message':null,'type':{}}}", "x", "", "" },
        { "{'error':{'message':'a\\nb\\u001b[2Jc\\u0000'}}",
          "x: a b [2Jc ", "", "" },
        { "{'error':{'error':{'error':{'message':'deep'}}}}", "x: deep", "",
          "" },
        { "{'error':null,'message':'Bad'}", "x: Bad", "", "" },
        { "{'message':'a','message':'','type':'t','type':'','code':1,"
          "'code':''}",
          "x", "", "" },
        { "{'message':'outside','error':{'type':'t'}}", "x", "t", "" },
        { "{'detail':'x'}", "x", "", "" },
        { "<html>", "x", "", "" },
        { "", "x", "", "" },
        { "[]", "x", "", "" },
        { "{'code':'0123456789012345678901234567890123456789012345678901'}",
          "x", "", "01234567890123456789012345678901234567890123456" },
    };

    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        llmcb_error e = error_of(rows[i].json, strlen(rows[i].json));
        CHECK_STR(e.message, rows[i].message);
        CHECK_STR(e.type, rows[i].type);
        CHECK_STR(e.provider_code, rows[i].code);
    }
}

/* ---- tool calls ----------------------------------------------------------*/

#define TOOLS(pieces) DELTA("'tool_calls':[" pieces "]")

TEST(tool_calls_are_put_together)
{
    static const row rows[] = {
        /* as it should be */
        { TOOLS("{'index':0,'id':'a','type':'function','function':"
                "{'name':'f','arguments':''}}")
              TOOLS("{'index':0,'function':{'arguments':'{\\'x\\''}}")
                  TOOLS("{'index':0,'function':{'arguments':':1}'}}"),
          "OK {a f {'x':1} valid}" },
        { TOOLS("{'index':0,'id':'a','function':{'name':'f'}},"
                "{'index':1,'id':'b','function':{'name':'g'}}")
              TOOLS("{'index':1,'function':{'arguments':'{'}}")
                  TOOLS("{'index':0,'function':{'arguments':'{}'}},"
                        "{'index':1,'function':{'arguments':'}'}}"),
          "OK {a f {} valid} {b g {} valid}" },
        { DELTA("'tool_calls':null") TEXT("a"), "OK a" },
        { DELTA("'tool_calls':[]") TEXT("a"), "OK a" },
        { DELTA("'tool_calls':{}") TEXT("a"), "OK a" },
        { DELTA("'tool_calls':[null,1,'x',[{}]]") TEXT("a"), "OK a" },
        /* whole calls in one chunk */
        { TOOLS("{'index':0,'id':'a','function':{'name':'f','arguments':"
                "'{\\'x\\':1}'}}"),
          "OK {a f {'x':1} valid}" },
        { TOOLS("{'id':'a','function':{'name':'f','arguments':'{}'}},"
                "{'id':'b','function':{'name':'g','arguments':'{}'}}"),
          "OK {a f {} valid} {b g {} valid}" },
        { TOOLS("{'id':'a','function':{'name':'f','arguments':'{}'}}")
              TOOLS("{'id':'b','function':{'name':'f','arguments':'{}'}}"),
          "OK {a f {} valid} {b f {} valid}" },
        { TOOLS("{'function':{'name':'f','arguments':'{}'}},"
                "{'function':{'name':'g','arguments':'{}'}}"),
          "OK { f {} valid} { g {} valid}" },
        { TOOLS("{'function':{'name':'f','arguments':'{}'}}")
              TOOLS("{'function':{'name':'f','arguments':'{}'}}"),
          "OK { f {} valid} { f {} valid}" },
        { TOOLS("{'function':{'name':'f'}},{'function':{'name':'g'}}"),
          "OK { f  valid} { g  valid}" },
        { TOOLS("{'id':'a','function':{'name':'f'}},"
                "{'id':'b','function':{'name':'g'}}"),
          "OK {a f  valid} {b g  valid}" },
        /* the number: missing, null, constant, odd */
        { TOOLS("{'id':'a','function':{'name':'f','arguments':''}}")
              TOOLS("{'function':{'arguments':'{'}}")
                  TOOLS("{'function':{'arguments':'}'}}"),
          "OK {a f {} valid}" },
        { TOOLS("{'index':null,'id':'a','function':{'name':'f','arguments':"
                "'{'}}") TOOLS("{'index':null,'function':{'arguments':'}'}}"),
          "OK {a f {} valid}" },
        { TOOLS("{'index':0,'id':'a','function':{'name':'f','arguments':"
                "'{}'}}")
              TOOLS("{'index':0,'id':'b','function':{'name':'g','arguments':"
                    "'{'}}")
                  TOOLS("{'index':0,'function':{'arguments':'}'}}"),
          "OK {a f {} valid} {b g {} valid}" },
        { TOOLS("{'index':0,'id':'a','function':{'name':'f'}},"
                "{'index':0,'id':'b','function':{'name':'g'}}"),
          "OK {a f  valid} {b g  valid}" },
        { TOOLS("{'index':'0','id':'a','function':{'name':'f','arguments':"
                "'{'}}")
              TOOLS("{'index':1.5,'id':'a','function':{'arguments':'}'}}"),
          "OK {a f {} valid}" },
        { TOOLS("{'index':-1,'id':'a','function':{'name':'f','arguments':"
                "'{'}}") TOOLS("{'index':-1,'function':{'arguments':'}'}}"),
          "OK {a f {} valid}" },
        { TOOLS("{'index':4294967295,'id':'a','function':{'name':'f',"
                "'arguments':'{'}}")
              TOOLS("{'index':4294967295,'function':{'arguments':'}'}}"),
          "OK {a f {} valid}" },
        { TOOLS("{'index':1,'id':'b','function':{'name':'g'}}")
              TOOLS("{'index':0,'id':'a','function':{'name':'f'}}")
                  TOOLS("{'index':1,'function':{'arguments':'{}'}}"),
          "OK {b g {} valid} {a f  valid}" },
        { TOOLS("{'index':1,'id':'a','function':{'name':'f','arguments':"
                "'{}'}}")
              TOOLS("{'index':0,'id':'a','function':{'name':'g','arguments':"
                    "'{}'}}"),
          "OK {a f {} valid} {a g {} valid}" }, /* the number decides */
        { TOOLS("{'index':1,'id':'b','function':{'name':'g','arguments':"
                "'{}'}}") TOOLS("{'index':0,'function':{'arguments':'{}'}}"),
          "OK {b g {} valid} {  {} bad}" },
        /* the number decides, though all ids are the same */
        { TOOLS("{'index':0,'id':'a','function':{'name':'f','arguments':"
                "'{}'}},{'index':1,'id':'a','function':{'name':'g',"
                "'arguments':'{}'}}"),
          "OK {a f {} valid} {a g {} valid}" },
        /* the number only at first, or only later: then the id decides */
        { TOOLS("{'index':0,'id':'a','function':{'name':'f','arguments':"
                "'{'}}")
              TOOLS("{'id':'a','function':{'arguments':'}'}}"),
          "OK {a f {} valid}" },
        { TOOLS("{'id':'a','function':{'name':'f','arguments':'{'}}")
              TOOLS("{'index':0,'id':'a','function':{'arguments':'}'}}"),
          "OK {a f {} valid}" },
        { TOOLS("{'id':'a','function':{'name':'f','arguments':'{'}},"
                "{'id':'b','function':{'name':'g','arguments':'{'}}")
              TOOLS("{'id':'a','function':{'arguments':'}'}}")
                  TOOLS("{'id':'b','function':{'arguments':'}'}}"),
          "OK {a f {} valid} {b g {} valid}" },
        /* id and name: later null or empty, changing, repeated, late */
        { TOOLS("{'index':0,'id':'a','function':{'name':'f','arguments':"
                "'{'}}")
              TOOLS("{'index':0,'id':null,'function':{'name':null,"
                    "'arguments':''}}")
                  TOOLS("{'index':0,'id':'','function':{'name':'',"
                        "'arguments':'}'}}"),
          "OK {a f {} valid}" },
        { TOOLS("{'index':0,'id':'a','function':{'name':'f','arguments':"
                "'{'}}")
              TOOLS("{'index':0,'id':'b','function':{'arguments':' '}}")
                  TOOLS("{'index':0,'id':'c','function':{'arguments':'}'}}"),
          "OK {a f { } valid}" },
        { TOOLS("{'id':'a','function':{'name':'f','arguments':'{'}}")
              TOOLS("{'id':'b','function':{'arguments':'}'}}"),
          "OK {a f {} valid}" },
        { TOOLS("{'index':0,'id':'a','function':{'name':'f','arguments':"
                "'{'}}")
              TOOLS("{'index':0,'id':'a','function':{'name':'f','arguments':"
                    "'}'}}"),
          "OK {a f {} valid}" },
        { TOOLS("{'index':0,'function':{'name':'f','arguments':'{'}}")
              TOOLS("{'index':0,'function':{'name':'f','arguments':'}'}}"),
          "OK { f {} valid}" },
        { TOOLS("{'index':0,'id':'a','function':{'name':'f','arguments':"
                "'{'}}")
              TOOLS("{'index':0,'id':null,'function':{'name':'f',"
                    "'arguments':'}'}}"),
          "OK {a f {} valid}" },
        { TOOLS("{'index':0,'function':{'name':'f','arguments':'{'}}")
              TOOLS("{'index':0,'id':'a','function':{'name':'f',"
                    "'arguments':'}'}}"),
          "OK {a f {} valid}" },
        { TOOLS("{'id':'a','function':{'name':'f','arguments':'{'}}")
              TOOLS("{'id':'a','function':{'name':'f','arguments':'}'}}"),
          "OK {a f {} valid}" },
        { TOOLS("{'index':0,'function':{'name':'f'}}")
              TOOLS("{'index':0,'id':'a','function':{'arguments':'{}'}}"),
          "OK {a f {} valid}" },
        { TOOLS("{'index':0,'id':'a'}")
              TOOLS("{'index':0,'function':{'name':'f','arguments':'{}'}}"),
          "OK {a f {} valid}" },
        { TOOLS("{'index':0,'id':'a\\/b','function':{'name':'f','arguments':"
                "'{'}}")
              TOOLS("{'index':0,'id':'a\\/b','function':{'name':'f',"
                    "'arguments':'}'}}"),
          "OK {a/b f {} valid}" },
        { TOOLS("{'id':'a\\/b','function':{'name':'f','arguments':'{'}},"
                "{'id':'c','function':{'name':'g','arguments':'{'}}")
              TOOLS("{'id':'a\\/b','function':{'arguments':'}'}}"),
          "OK {a/b f {} valid} {c g { bad}" },
        /* the name with each piece: a whole object ends a call, and what
         * only looks like one does not */
        { TOOLS("{'function':{'name':'f','arguments':'{'}}")
              TOOLS("{'function':{'name':'f','arguments':'\\'}\\':'}}")
                  TOOLS("{'function':{'name':'f','arguments':'{}'}}")
                      TOOLS("{'function':{'name':'f','arguments':'} '}}")
                          TOOLS("{'function':{'name':'f','arguments':'{}'}}")
                              TOOLS("{'function':{'name':'f'}}"),
          "OK { f {'}':{}}  valid} { f {} valid} { f  valid}" },
        { TOOLS("{'function':{'name':'f','arguments':'{x}'}}")
              TOOLS("{'function':{'name':'f','arguments':'{'}}")
                  TOOLS("{'function':{'name':'f','arguments':'}'}}"),
          "OK { f {x}{} bad}" },
        { TOOLS("{'function':{'name':'f','arguments':'{}x'}}")
              TOOLS("{'function':{'name':'f','arguments':'{}'}}"),
          "OK { f {}x{} bad}" },
        { TOOLS("{'function':{'name':'f','arguments':'{\\'a\\\\\\''}}")
              TOOLS("{'function':{'name':'f','arguments':'}\\':1}'}}")
                  TOOLS("{'function':{'name':'f','arguments':'{}'}}"),
          "OK { f {'a\\'}':1} valid} { f {} valid}" },
        /* the arguments: an object, none, of a wrong type, not whole */
        { TOOLS("{'id':'a','function':{'name':'f','arguments':"
                "{'x':[1,{'y':'\\u00e9'}]}}}"),
          "OK {a f {'x':[1,{'y':'\\u00e9'}]} valid}" },
        { TOOLS("{'index':0,'id':'a','function':{'name':'f','arguments':{}}}")
              TOOLS("{'index':0,'function':{'arguments':{}}}"),
          "OK {a f {} valid}" },
        { TOOLS("{'id':'a','function':{'name':'f'}}"), "OK {a f  valid}" },
        { TOOLS("{'id':'a','function':{'name':'f','arguments':null}}"),
          "OK {a f  valid}" },
        { TOOLS("{'id':'a','function':{'name':'f','arguments':[1]}}"),
          "OK {a f  valid}" },
        { TOOLS("{'id':'a','function':{'name':'f','arguments':5}}"),
          "OK {a f  valid}" },
        { TOOLS("{'id':'a','function':{'name':'f','arguments':'{\\'x'}}"),
          "OK {a f {'x bad}" },
        { TOOLS("{'id':'a','function':{'name':'f','arguments':'[]'}}"),
          "OK {a f [] bad}" },
        { TOOLS("{'id':'a','function':{'name':'f','arguments':'{}{}'}}"),
          "OK {a f {}{} bad}" },
        { TOOLS("{'id':'a','function':{'arguments':'{}'}}"),
          "OK {a  {} bad}" },
        { TOOLS("{'id':'a','function':null}"), "OK {a   bad}" },
        { TOOLS("{'id':5,'function':'x'}"), "OK {   bad}" },
        { TOOLS("{'index':0,'id':'a','function':{'name':'f','arguments':"
                "'\\'\\ud83d'}}")
              TOOLS("{'index':0,'function':{'arguments':'\\ude00\\''}}"),
          "OK {a f '\xF0\x9F\x98\x80' bad}" },
        /* beside text, in choices of their own, with a wrong reason */
        { DELTA("'content':'a','tool_calls':[{'index':0,'id':'a','function':"
                "{'name':'f'}}]") STOP,
          "OK a finish=stop {a f  valid}" },
        { "{'choices':[{'index':1,'delta':{'tool_calls':[{'index':0,'id':"
          "'a','function':{'name':'f'}}]}}]}\n" TOOLS(
              "{'index':0,'id':'b','function':{'name':'g'}}"),
          "OK {b g  valid} | {a f  valid}" },
        /* the form before tools */
        { DELTA("'function_call':{'name':'f','arguments':''}")
              DELTA("'function_call':{'arguments':'{'}")
                  DELTA("'function_call':{'arguments':'}'}"),
          "OK { f {} valid}" },
        { DELTA("'tool_calls':[{'index':0,'id':'x','function':{'name':'f',"
                "'arguments':'{}'}}],'function_call':{'name':'g',"
                "'arguments':'1'}"), "OK {x f {} valid} { g 1 bad}" },
        { DELTA("'function_call':null") TEXT("a"), "OK a" },
        { DELTA("'function_call':{'name':'f','arguments':{'x':1}}"),
          "OK { f {'x':1} valid}" },
    };

    ROWS(rows);
}

/* In as many pieces as there are, each with the name and no id. */
TEST(a_call_may_come_in_many_pieces_with_its_name)
{
    enum { N = 5000 };
    llmcbi_buf b;
    char *bytes;
    answer a;

    memset(&b, 0, sizeof b);
    for (int call = 0; call < 2; call++)
        for (int i = 0; i < N; i++) {
            llmcbi_buf_text(&plain, &b,
                            "{'choices':[{'delta':{'tool_calls':[{'function':{"
                            "'name':'f','arguments':'");
            llmcbi_buf_text(&plain, &b,
                            i == 0       ? "{\\'x\\':[1"
                            : i == N - 1 ? "]}"
                                         : ",1");
            llmcbi_buf_text(&plain, &b, "'}}]}}]}\n");
        }
    bytes = stream_of(b.ptr);
    a = ask(bytes, strlen(bytes), LLMCB_REPLAY_CLOSE, true, false);
    CHECK_INT(a.error.code, LLMCB_OK);
    CHECK_INT(a.tokens, 2 * N);
    for (int call = 0; call < 2; call++)
        CHECK_INT(a.lengths[call], strlen("{\"x\":[1]}") + 2 * (N - 2));
    CHECK(!strstr(a.line, "bad}") && strstr(a.line, "valid} { f {"));
    free(bytes);
    llmcbi_buf_free(&plain, &b);
}

/* Text that is passed on as it stands must be text as well. */
TEST(json_that_is_passed_on_is_utf8)
{
    static const char *const rows[] = {
        TOOLS("{'id':'a','function':{'name':'f','arguments':{'x':'\xFF'}}}"),
        "{'choices':[{'delta':{},'logprobs':{'x':'\xC3'}}]}\n",
        "{'model':'\xFF','id':'\xFF','system_fingerprint':'\xFF'}\n",
        "{'choices':[{'delta':{'content':'\xFF'},'finish_reason':'\xFF'}]}\n",
    };

    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char *bytes = stream_of(rows[i]);
        answer a = ask(bytes, strlen(bytes), LLMCB_REPLAY_CLOSE, true, false);
        if (a.dirty) TEST_FAIL("%s: not UTF-8", rows[i]);
        free(bytes);
    }
}

/* Bytes that grow threefold, in ids that must be compared and JSON that is
 * passed on, of all lengths around those of buffers. */
TEST(text_that_grows_has_room_everywhere)
{
    static const char *const forms[] = {
        TOOLS("{'id':'%1$s','function':{'name':'f','arguments':'{'}}")
            TOOLS("{'id':'%1$s','function':{'name':'f','arguments':'}'}}"),
        TOOLS("{'id':'%1$s','function':{'name':'%1$s','arguments':'%1$s'}}"),
        TOOLS("{'function':{'name':'f','arguments':{'%1$s':'%1$s'}}}"),
        DELTA("'function_call':{'name':'%1$s','arguments':{'x':'%1$s'}}"),
        "{'choices':[{'delta':{},'logprobs':{'x':'%1$s'}}]}\n",
        DELTA("'refusal':'%1$s','reasoning':'%1$s','content':'%1$s'"),
        "{'choices':[{'delta':{},'finish_reason':'%1$s'}],'id':'%1$s'}\n",
    };

    for (size_t f = 0; f < sizeof forms / sizeof *forms; f++)
        for (size_t n = 1; n < 400; n += n < 120 || n > 136 ? 7 : 1) {
            char bad[401], *s = malloc(5000), *bytes;
            answer a;
            memset(bad, 0xFF, n);
            bad[n] = '\0';
            sprintf(s, forms[f], bad);
            bytes = stream_of(s);
            a = ask(bytes, strlen(bytes), LLMCB_REPLAY_CLOSE, true, false);
            CHECK(a.error.code == LLMCB_OK && !a.dirty);
            if (f == 0 && n <= 128) CHECK(strstr(a.line, "f {} valid}"));
            free(bytes);
            free(s);
        }
}

TEST(there_may_be_128_tool_calls)
{
    for (int n = 128; n < 130; n++) {
        llmcbi_buf b;
        char *bytes, piece[200];
        answer a;
        memset(&b, 0, sizeof b);
        for (int i = 0; i < n; i++) {
            sprintf(piece, TOOLS("{'index':%d,'function':{'arguments':''}}"),
                    i);
            llmcbi_buf_text(&plain, &b, piece);
        }
        bytes = stream_of(b.ptr);
        a = ask(bytes, strlen(bytes), LLMCB_REPLAY_CLOSE, true, false);
        CHECK_INT(a.error.code, n > 128 ? LLMCB_ELIMIT : LLMCB_OK);
        free(bytes);
        llmcbi_buf_free(&plain, &b);
    }
}

/* ---- answers that are no stream ------------------------------------------*/

TEST(a_whole_answer_is_read_like_a_stream)
{
    static const row rows[] = {
        { "{'id':'i','model':'m','choices':[{'index':0,'message':{'role':"
          "'assistant','content':'Hi','refusal':null,'tool_calls':[{'id':"
          "'a','type':'function','function':{'name':'f','arguments':"
          "'{\\'x\\':1}'}},{'id':'b','function':{'name':'g','arguments':"
          "'{}'}}]},'finish_reason':'tool_calls'}],'usage':"
          "{'prompt_tokens':1,'completion_tokens':2}}",
          "OK Hi finish=tool_calls {a f {'x':1} valid} {b g {} valid} "
          "usage=1+2=3,0,0 model=m id=i" },
        { "{'choices':[{'index':1,'message':{'content':'b'}},"
          "{'index':0,'message':{'content':'a'}}]}",
          "OK a | b" },
        { " \r\n{'choices':[{'message':{'content':'a'}}]}\n\n", "OK a" },
        { "{'choices':[{'message':{'content':null,'function_call':{'name':"
          "'f','arguments':'{}'}},'finish_reason':'function_call'}]}",
          "OK finish=function_call { f {} valid}" },
        { "{'error':{'message':'Bad'}}", "EAPI" },
        { "{'error':'Bad'}", "EAPI" },
        { "{}", "EPROTO" },
        { "{'choices':[]}", "EPROTO" },
        { "{'choices':null}", "EPROTO" },
        { "{'choices':[{'message':{'content':'a'}}]", "EJSON" },
        { "{'choices':[{'message':{'content':'a'}}]}x", "EJSON" },
        { "<html></html>", "ECTYPE" },
        { "", "ETRUNCATED" },
        { "  \n ", "ETRUNCATED" },
    };

    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char *json = quoted(rows[i].events), *want = quoted(rows[i].want);
        char *bytes = malloc(strlen(json) + 100);
        sprintf(bytes, HEAD "%s", json);
        for (int k = 0; k < 4; k++) {
            answer a = ask(bytes, strlen(bytes), LLMCB_REPLAY_CLOSE, k & 1,
                           k & 2);
            if (strcmp(a.line, want) != 0)
                TEST_FAIL("%s:\n    %s, not\n    %s", json, a.line, want);
        }
        free(bytes);
        free(json);
        free(want);
    }
}

/* ---- the reader alone ----------------------------------------------------*/

/* A document behind whose last byte there is a trap. */
TEST(no_part_of_an_event_is_one)
{
    enum { PAGE = 1 << 16 };
    char *json = quoted(
        "{'id':'i','model':'m\\u0000','choices':[{'index':0,'delta':{"
        "'content':'a\\ud83d\\ude00','tool_calls':[{'index':0,'function':"
        "{'name':'f','arguments':{'x':[1.5e3,true,null]}}}],'refusal':null},"
        "'logprobs':{'content':[]},'finish_reason':'stop'},{'index':1,"
        "'delta':{'content':'b'}}],'usage':{'prompt_tokens':1,"
        "'prompt_tokens_details':{'cached_tokens':2}},'error':null}");
    char *base = mmap(NULL, 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS,
                      -1, 0);
    llmcbi_wire_event ev;
    bool too_deep = false;

    REQUIRE(base != MAP_FAILED);
    REQUIRE(mprotect(base, PAGE, PROT_READ | PROT_WRITE) == 0);
    for (size_t n = 0; n <= strlen(json); n++) {
        char *at = memcpy(base + PAGE - n, json, n);
        if (llmcbi_wire_read(at, n, &ev, &too_deep) != (n == strlen(json)))
            TEST_FAIL("the first %d bytes", (int)n);
        CHECK(!too_deep);
    }
    CHECK(ev.has_choice && ev.more && ev.choice.has_delta &&
          !ev.choice.text.plain && ev.usage.cached_tokens == 2 &&
          !ev.error.len);
    CHECK(llmcbi_wire_next_choice(&ev.rest, &ev.choice));
    CHECK(ev.choice.index == 1 && ev.choice.text.plain);
    CHECK(!llmcbi_wire_next_choice(&ev.rest, &ev.choice));
    munmap(base, 2 * PAGE);
    free(json);
}

/* ---- the request ---------------------------------------------------------*/

static char *sent; /* the body of the last request */

static llmcb_code catch_start(llmcb_transport *tr, llmcb_exchange *x,
                              const llmcb_request *request)
{
    (void)tr;
    (void)x;
    CHECK_INT(request->body_len, strlen(request->body));
    free(sent);
    sent = malloc(request->body_len + 1);
    memcpy(sent, request->body, request->body_len);
    sent[request->body_len] = '\0';
    return LLMCB_ECONNECT;
}

static void catch_nothing(llmcb_transport *tr, llmcb_exchange *x)
{
    (void)tr;
    (void)x;
}

/* What becomes of a request; its body is in `sent`, NULL: there was none. */
static llmcb_code request_with(llmcb_chat_desc cd, const llmcb_message *m,
                               size_t n, const llmcb_config *config)
{
    llmcb_loop *loop = llmcb_loop_new(NULL);
    llmcb_transport tr;
    llmcb_chat *chat;
    llmcb_op *op;
    llmcb_code code;

    memset(&tr, 0, sizeof tr);
    tr.start = catch_start;
    tr.resume = tr.release = tr.cancel = catch_nothing;
    llmcb_transport_init(loop, &tr);
    if (!cd.base_url) cd.base_url = "http://localhost/v1";
    cd.api_key = "";
    cd.max_retries = -1;
    cd.transport = &tr;
    free(sent);
    sent = NULL;
    chat = llmcb_chat_new(loop, &cd);
    op = llmcb_chat_generate(chat, m, n, config);
    code = llmcb_op_wait(op);
    llmcb_op_free(op);
    llmcb_chat_free(chat);
    CHECK_INT(llmcb_loop_free(loop), LLMCB_OK);
    return code;
}

static llmcb_code request(llmcb_chat_desc cd, const llmcb_message *m, size_t n)
{
    return request_with(cd, m, n, NULL);
}

/* Each member of an object once, and none of them null. */
static void check_members(const char *json)
{
    char seen[4000] = "|", name[200];
    llmcbi_json j;

    llmcbi_json_init(&j, json, strlen(json));
    CHECK_INT(llmcbi_json_next(&j), LLMCBI_JSON_OBJECT);
    while (llmcbi_json_next(&j) == LLMCBI_JSON_KEY) {
        size_t n = llmcbi_json_decode(name + 1, j.str, j.len,
                                      &(llmcbi_carry){ 0, { 0 }, 0 });
        *name = '|';
        memcpy(name + 1 + n, "|", 2);
        if (strstr(seen, name)) TEST_FAIL("twice %s in %s", name, json);
        strcat(seen, name + 1);
        if (llmcbi_json_raw(&j) == LLMCBI_JSON_NULL)
            TEST_FAIL("%s is null in %s", name, json);
    }
    CHECK(llmcbi_json_whole(&j));
}

#define MESSAGES "{'messages':[{'role':'user','content':'?'}],"
#define STREAMS "'stream':true,'stream_options':{'include_usage':true}"
#define OPENAI "https://api.openai.com/v1"
#define AZURE "https://x.openai.azure.com/openai/deployments/d"

TEST(parameters_are_sent_once_and_extra_wins)
{
    static const struct {
        llmcb_chat_desc d;
        const char *want; /* behind the messages */
    } rows[] = {
        { { .model = NULL }, "'model':'gpt-4o-mini','stream':false}" },
        { { .model = "m", .streaming = true }, "'model':'m'," STREAMS "}" },
        { { .model = "m", .streaming = true, .no_usage = true },
          "'model':'m','stream':true}" },
        { { .model = "m\"\\\n", .n = 2 },
          "'model':'m\\'\\\\\\n','stream':false,'n':2}" },
        { { .model = "m", .n = 1, .max_tokens = 7 },
          "'model':'m','stream':false,'max_tokens':7}" },
        { { .model = "m", .max_tokens = 7, .base_url = OPENAI },
          "'model':'m','stream':false,'max_completion_tokens':7}" },
        { { .model = "m", .max_tokens = 7, .base_url = AZURE },
          "'model':'m','stream':false,'max_completion_tokens':7}" },
        { { .model = "m", .tools = "[{\"type\":\"function\"}]" },
          "'model':'m','stream':false,'tools':[{'type':'function'}]}" },
        { { .model = "m", .extra = "{}" }, "'model':'m','stream':false}" },
        { { .model = "m", .extra = " { \n} " },
          "'model':'m','stream':false}" },
        { { .model = "m", .extra = " {\"seed\":1, \"stop\":[\"}\"]} " },
          "'model':'m','stream':false,'seed':1,'stop':['}']}" },
        { { .model = "m", .extra = "{\"model\":\"x\"}" },
          "'stream':false,'model':'x'}" },
        { { .model = "m", .extra = "{\"m\\u006fdel\":\"x\"}" },
          "'stream':false,'m\\u006fdel':'x'}" },
        { { .model = "m", .streaming = true, .n = 2, .max_tokens = 7,
            .tools = "[]",
            .extra = "{\"tools\":[1],\"n\":3,\"max_tokens\":8,"
                     "\"stream_options\":{},\"stream\":true,\"model\":\"x\"}" },
          "'tools':[1],'n':3,'max_tokens':8,'stream_options':{},"
          "'stream':true,'model':'x'}" },
        { { .model = "m", .extra = "{\"x\":{\"model\":1,\"stream\":2}}" },
          "'model':'m','stream':false,'x':{'model':1,'stream':2}}" },
    };
    llmcb_message m = { .content = "?" };

    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char *want = quoted(rows[i].want), *head = quoted(MESSAGES);
        CHECK_INT(request(rows[i].d, &m, 1), LLMCB_ECONNECT);
        REQUIRE(sent);
        CHECK(strncmp(sent, head, strlen(head)) == 0);
        CHECK_STR(sent + strlen(head), want);
        check_members(sent);
        free(want);
        free(head);
    }
}

/* What is accepted is sent as it is, however deep. */
TEST(tools_of_the_greatest_depth_are_sent_whole)
{
    llmcb_message m = { .content = "?" };
    llmcb_chat_desc d = { .model = "m" };
    char deep[2 * 128 + 1], *want;
    size_t n;

    memset(deep, '[', 128);
    memset(deep + 128, ']', 128);
    deep[256] = '\0';
    d.tools = deep;
    CHECK_INT(request(d, &m, 1), LLMCB_ECONNECT);
    REQUIRE(sent);
    want = strstr(sent, "\"tools\":[");
    REQUIRE(want);
    n = strlen("\"tools\":");
    CHECK(strncmp(want + n, deep, 256) == 0);
    CHECK_STR(want + n + 256, "}");
}

/* Members that are the same thing under two names, or that are ours. */
TEST(extra_wins_over_all_that_is_sent_besides)
{
    static const llmcb_chat_desc rows[] = {
        { .extra = "{\"messages\":[]}" },
        { .max_tokens = 7, .base_url = OPENAI,
          .extra = "{\"max_tokens\":8}" },
        { .max_tokens = 7, .extra = "{\"max_completion_tokens\":8}" },
    };
    llmcb_message m = { .content = "?" };

    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        request(rows[i], &m, 1);
        if (!sent) continue; /* refused: as good */
        check_members(sent);
        if (strstr(sent, "max_tokens") &&
            strstr(sent, "max_completion_tokens"))
            TEST_FAIL("two limits: %s", sent);
    }
}

TEST(a_calls_extra_wins_over_the_chats)
{
    static const struct {
        const char *chat, *call, *want;
    } rows[] = {
        { "{\"seed\":1,\"x\":2}", "{\"seed\":3}",
          "'model':'m','stream':false,'x':2,'seed':3}" },
        { "{\"x\":2,\"s\\u0065ed\":1,\"y\":3}", "{\"seed\":3}",
          "'model':'m','stream':false,'x':2,'y':3,'seed':3}" },
        { "{\"model\":\"x\"}", "{\"mod\\u0065l\":\"y\"}",
          "'stream':false,'mod\\u0065l':'y'}" },
        { "{\"seed\":1}", "{\"see\":3,\"seeds\":4}",
          "'model':'m','stream':false,'seed':1,'see':3,'seeds':4}" },
        { NULL, "{\"seed\":3}", "'model':'m','stream':false,'seed':3}" },
    };
    llmcb_message m = { .content = "?" };

    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char *want = quoted(rows[i].want);
        llmcb_config config = { .extra = rows[i].call };
        request_with((llmcb_chat_desc){ .model = "m", .extra = rows[i].chat },
                     &m, 1, &config);
        REQUIRE(sent);
        CHECK_STR(sent + strlen(MESSAGES), want);
        check_members(sent);
        free(want);
    }
}

#define S(s) { s, sizeof(s) - 1 }

TEST(messages_are_written_with_all_they_have)
{
    static const llmcb_tool_call calls[] = {
        { S("a"), S("f"), S("{\"x\":\"\\n\"}"), true },
        { S("b\""), S("g"), S(""), true },
    };
    static const struct {
        llmcb_message m;
        const char *want;
    } rows[] = {
        { { .content = "a" }, "{'role':'user','content':'a'}" },
        { { .role = LLMCB_SYSTEM, .content = "" },
          "{'role':'system','content':''}" },
        { { .role = LLMCB_DEVELOPER, .content = "abc", .content_len = 2 },
          "{'role':'developer','content':'ab'}" },
        { { .content = "a\0\"\\\n\x7F\xC3\xA9", .content_len = 8 },
          "{'role':'user','content':'a\\u0000\\'\\\\\\n\\u007f\xC3\xA9'}" },
        { { .content = "a", .name = "n\"" },
          "{'role':'user','content':'a','name':'n\\''}" },
        { { .role = LLMCB_TOOL, .content = "r", .tool_call_id = "i" },
          "{'role':'tool','content':'r','tool_call_id':'i'}" },
        { { .role = LLMCB_ASSISTANT }, "{'role':'assistant','content':''}" },
        { { .role = LLMCB_ASSISTANT, .tool_calls = calls, .n_tool_calls = 2 },
          "{'role':'assistant','content':null,'tool_calls':["
          "{'type':'function','id':'a','function':{'name':'f','arguments':"
          "'{\\'x\\':\\'\\\\n\\'}'}},"
          "{'type':'function','id':'b\\'','function':{'name':'g',"
          "'arguments':''}}]}" },
        { { .role = LLMCB_ASSISTANT, .content = "t", .tool_calls = calls,
            .n_tool_calls = 1 },
          "{'role':'assistant','content':'t','tool_calls':[{'type':"
          "'function','id':'a','function':{'name':'f','arguments':"
          "'{\\'x\\':\\'\\\\n\\'}'}}]}" },
        { { .content = "seen", .parts = "[{\"type\":\"text\"}]" },
          "{'role':'user','content':[{'type':'text'}]}" },
    };
    llmcb_message two[2];
    llmcb_chat_desc d;

    memset(&d, 0, sizeof d);
    d.model = "m";
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char *one = quoted(rows[i].want), *want = malloc(2 * strlen(one) + 99);
        sprintf(want, "{\"messages\":[%s,%s],\"model\":\"m\",\"stream\":false}",
                one, one);
        two[0] = two[1] = rows[i].m;
        CHECK_INT(request(d, two, 2), LLMCB_ECONNECT);
        CHECK_STR(sent, want);
        free(one);
        free(want);
    }
}

TEST(messages_that_cannot_be_sent_are_refused)
{
    static const llmcb_tool_call calls[] = {
        { S("\xFF"), S("f"), S("{}"), true },
        { S("a"), S("\xC3"), S("{}"), true },
        { S("a"), S("f"), S("\xED\xA0\x80"), true },
    };
    static const struct {
        llmcb_message m;
        llmcb_code want;
    } rows[] = {
        { { .content = "\xFF" }, LLMCB_EUTF8 },
        { { .content = "a\xC3" }, LLMCB_EUTF8 },
        { { .content = "a\xC3\xA9", .content_len = 2 }, LLMCB_EUTF8 },
        { { .content = "\xC0\x80" }, LLMCB_EUTF8 },
        { { .content = "\xED\xA0\x80" }, LLMCB_EUTF8 },
        { { .content = "a", .name = "\xFF" }, LLMCB_EUTF8 },
        { { .role = LLMCB_TOOL, .content = "a", .tool_call_id = "\xFF" },
          LLMCB_EUTF8 },
        { { .role = LLMCB_ASSISTANT, .tool_calls = calls, .n_tool_calls = 1 },
          LLMCB_EUTF8 },
        { { .role = LLMCB_ASSISTANT, .tool_calls = calls + 1,
            .n_tool_calls = 1 },
          LLMCB_EUTF8 },
        { { .role = LLMCB_ASSISTANT, .tool_calls = calls + 2,
            .n_tool_calls = 1 },
          LLMCB_EUTF8 },
        { { .content = "a", .parts = "[\"\xFF\"]" }, LLMCB_EUTF8 },
        { { .role = (llmcb_role)5, .content = "a" }, LLMCB_EINVAL },
        { { .role = (llmcb_role)-1, .content = "a" }, LLMCB_EINVAL },
        { { .role = LLMCB_TOOL, .content = "a" }, LLMCB_EINVAL },
        { { .role = LLMCB_ASSISTANT, .n_tool_calls = 1 }, LLMCB_EINVAL },
        { { .parts = "{}" }, LLMCB_EINVAL },
        { { .parts = "[" }, LLMCB_EINVAL },
        { { .parts = "[]," }, LLMCB_EINVAL },
        { { .parts = "" }, LLMCB_EINVAL },
    };
    static const llmcb_chat_desc descs[] = {
        { .model = "\xFF" },       { .tools = "{}" },
        { .tools = "[" },          { .tools = "[\"\xFF\"]" },
        { .extra = "[]" },         { .extra = "{\"a\":}" },
        { .extra = "{\"a\":1},{\"b\":2}" }, { .extra = "{\"\xFF\":1}" },
        { .extra = "" },
    };
    llmcb_message m = { .content = "?" };
    llmcb_chat_desc none;

    memset(&none, 0, sizeof none);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        llmcb_code code = request(none, &rows[i].m, 1);
        if (code != rows[i].want || sent)
            TEST_FAIL("message %d: %s", (int)i, llmcb_code_name(code));
    }
    for (size_t i = 0; i < sizeof descs / sizeof *descs; i++) {
        llmcb_code code = request(descs[i], &m, 1);
        if ((code != LLMCB_EINVAL && code != LLMCB_EUTF8) || sent)
            TEST_FAIL("desc %d: %s", (int)i, llmcb_code_name(code));
    }
    free(sent);
    sent = NULL;
}

/* ---- what has crashed: last, since it ends the program -------------------*/

/* A string that needs no decoding, behind half a character: the half takes
 * room as well. */
TEST(half_a_character_before_plain_text_has_room)
{
    static const char *const halves[] = { "\\ud83d", "\xF0\x9F\x98" };
    static const char *const members[] = { "content", "refusal", "reasoning" };

    for (int half = 0; half < 2; half++)
        for (int m = 0; m < 3; m++)
            for (size_t n = 0; n < 1100; n += n < 40 || n >= 1000 ? 1 : 40) {
                char *s = malloc(n + 4000), *bytes, *at = s;
                answer a;
                at += sprintf(at, DELTA("'%s':'%s'"), members[m],
                              halves[half]);
                at += sprintf(at, DELTA("'%s':'%0*d'"), members[m],
                              (int)n + 1, 1);
                sprintf(at, DELTA("'%s':'%02000d'"), members[m], 1);
                bytes = stream_of(s);
                a = ask(bytes, strlen(bytes), LLMCB_REPLAY_CLOSE, true, false);
                CHECK_INT(a.error.code, LLMCB_OK);
                free(bytes);
                free(s);
            }
}

TEST(usage_that_is_too_large_to_add_is_no_crash)
{
    char *bytes = stream_of(USAGE("{'prompt_tokens':9223372036854775000,"
                                  "'completion_tokens':9223372036854775000}"));
    answer a = ask(bytes, strlen(bytes), LLMCB_REPLAY_CLOSE, true, false);

    CHECK(a.error.code == LLMCB_OK && !strstr(a.line, "=-"));
    free(bytes);
}

static bool is_either(const char *s, const char *a, const char *b)
{
    return strcmp(s, a) == 0 || strcmp(s, b) == 0;
}

/* Error bodies are cut at limits.error_body, wherever that is. */
TEST(an_error_that_is_cut_is_not_read_beyond_its_end)
{
    static const char s[] = "{'error':{'message':'cut','type':'true','code':"
                            "12345,'false':'null'},'x':'y'}";

    for (size_t n = 0; n < sizeof s; n++) {
        llmcb_error e = error_of(s, n);
        if (n == sizeof s - 1) CHECK_STR(e.message, "x: cut");
        else CHECK(is_either(e.message, "x", "x: cut"));
    }
}

TEST(a_redirect_tells_where_to_and_no_more)
{
    static const struct {
        const char *location, *message;
    } rows[] = {
        { "https://evil.example:8443/path?key=1",
          ": https://evil.example:8443" },
        { "http://a", ": http://a" },
        { "/login", "" },
        { "file:///etc/passwd", "" },
        { "https://user:secret@a/", "" },
        { "unix:/x:/y", "" },
    };

    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char bytes[300], want[300];
        answer a;
        sprintf(bytes, "HTTP/1.1 307 x\r\nContent-Length: 0\r\nLocation: %s"
                       "\r\n\r\n",
                rows[i].location);
        sprintf(want, "%s%s", llmcb_code_text(LLMCB_EREDIRECT),
                rows[i].message);
        a = ask(bytes, strlen(bytes), LLMCB_REPLAY_CLOSE, true, false);
        CHECK_INT(a.error.code, LLMCB_EREDIRECT);
        CHECK_STR(a.error.message, want);
    }
}

/* A zeroed llmcb_str has no address at all. */
TEST(a_tool_call_may_lack_an_id)
{
    static const llmcb_tool_call call = { { NULL, 0 }, S("f"), { NULL, 0 },
                                          true };
    llmcb_message m = { .role = LLMCB_ASSISTANT, .tool_calls = &call,
                        .n_tool_calls = 1 };
    llmcb_chat_desc d;

    memset(&d, 0, sizeof d);
    CHECK_INT(request(d, &m, 1), LLMCB_ECONNECT);
    CHECK(sent && strstr(sent, "\"id\":\"\",\"function\":{\"name\":\"f\","
                               "\"arguments\":\"\"}}]"));
    free(sent);
    sent = NULL;
}

static int on_start(llmcb_handler *h, const llmcb_event *ev)
{
    const llmcb_tool_call *c = ev->start->messages[0].tool_calls;

    (void)h;
    CHECK_STR(c->id.ptr, "");
    CHECK_STR(c->name.ptr, "");
    CHECK_STR(c->arguments.ptr, "");
    return 0;
}

/* ... nor do handlers, which have it copied. */
TEST(a_tool_call_of_nothing_is_told)
{
    llmcb_tool_call call;
    llmcb_message m = { .role = LLMCB_ASSISTANT, .tool_calls = &call,
                        .n_tool_calls = 1 };
    llmcb_handler h = { .sync.on_chat_model_start = on_start,
                        .flags = LLMCB_INLINE };
    llmcb_handler *handlers[] = { &h };
    llmcb_chat_desc d = { .callbacks = handlers, .n_callbacks = 1 };

    memset(&call, 0, sizeof call);
    CHECK_INT(request(d, &m, 1), LLMCB_ECONNECT);
    CHECK(sent && strstr(sent, "\"id\":\"\",\"function\":{\"name\":\"\","));
    free(sent);
    sent = NULL;
}

int main(int argc, char **argv)
{
    return test_main(argc, argv);
}

/*
 * trace_tree.c - the runs of an agent as a tree, with their durations
 *
 *     build/examples/trace_tree [FILE.jsonl]
 *
 * The agent of agent.c in small, offline and in virtual time, with four of
 * the ready-made handlers. With FILE every event is appended to it as JSON.
 */
#define LLMCB_IMPLEMENTATION
#include "llmcb.h"
#include <stdio.h>

static int get_weather(llmcb_tool_use *use)
{
    return llmcb_tool_answer(use, llmcb_text("21 degrees and sunny"));
}

static int add(llmcb_tool_use *use)
{
    return llmcb_tool_answer(use, llmcb_text("42"));
}

static llmcb_step wait_a_while(llmcb_task *t, llmcb_tool_use *use)
{
    (void)use;
    LLMCB_BEGIN(t);
    LLMCB_AWAIT(t, llmcb_sleep(t, 2000));
    LLMCB_END(t);
}

static const llmcb_tool tools[] = {
    { .name = "get_weather", .call = get_weather },
    { .name = "add", .call = add },
    { .name = "wait", .step = wait_a_while },
};

int main(int argc, char **argv)
{
    llmcb_loop_desc clock = { .virtual_clock = true };
    llmcb_loop *loop = llmcb_loop_new(&clock);
    llmcb_handler *usage = llmcb_usage_handler(loop);
    llmcb_handler *timing = llmcb_timing_handler(loop);
    llmcb_handler *tree = llmcb_tree_handler(loop, stdout);
    llmcb_handler *trace =
        argc > 1 ? llmcb_jsonl_handler(loop, argv[1], true) : NULL;
    llmcb_handler *callbacks[] = { usage, timing, tree, trace };
    llmcb_config config = { .callbacks = callbacks,
                            .n_callbacks = trace ? 4u : 3u };

    llmcb_replay_desc replay = { .path = "examples/recordings/agent.http" };
    llmcb_chat_desc desc = { .streaming = true,
                             .transport = llmcb_replay_new(loop, &replay) };
    llmcb_chat *chat = llmcb_chat_new(loop, &desc);
    llmcb_agent_desc agent = { .chat = chat, .tools = tools, .n_tools = 3 };
    llmcb_message question = { .role = LLMCB_USER,
                               .content = "How is the weather in Paris, what "
                                          "is 17.5 + 24.5, and could you wait "
                                          "two seconds?" };
    llmcb_op *op = llmcb_agent_start(&agent, &question, 1, &config);
    llmcb_code code = llmcb_op_wait(op);
    if (code != LLMCB_OK) fprintf(stderr, "%s\n", llmcb_op_error(op)->message);

    llmcb_timing pace = llmcb_timing_of(timing);
    printf("%d tokens in all; the last answer began after %d ms and came with "
           "%.0f tokens a second\n",
           (int)llmcb_usage_of(usage, NULL).total_tokens,
           (int)pace.first_token_ms, pace.tokens_per_second);

    llmcb_op_free(op);
    llmcb_chat_free(chat);
    llmcb_loop_free(loop);
    for (size_t i = 0; i < 4; i++)
        llmcb_handler_free(callbacks[i]);
    return code != LLMCB_OK;
}

/*
 * agent.c - a model that calls tools: two blocking ones and a coroutine
 *
 *     build/examples/agent [--live] [QUESTION]
 *
 * Without --live the model's answers come from examples/recordings/agent.http
 * and time is virtual. With it, OPENAI_API_KEY and OPENAI_BASE_URL are used.
 */
#define LLMCB_IMPLEMENTATION
#include "llmcb.h"
#include <stdio.h>
#include <string.h>

/* A blocking tool runs on the thread pool: it may take its time. */
static int get_weather(llmcb_tool_use *use)
{
    char text[200];
    llmcb_str city;
    llmcb_tool_text(use, "city", &city); /* it is there: that was checked */
    if (strcmp(city.ptr, "Paris") != 0)
        return llmcb_tool_fail(use, "only the weather of Paris is known");
    snprintf(text, sizeof text, "21 °C and sunny in %s", city.ptr);
    return llmcb_tool_answer(use, llmcb_text(text));
}

static int add(llmcb_tool_use *use)
{
    char text[100];
    double a, b;
    if (!llmcb_tool_number(use, "a", &a) || !llmcb_tool_number(use, "b", &b))
        return llmcb_tool_fail(use, "those numbers are too large");
    snprintf(text, sizeof text, "%.15g", a + b);
    return llmcb_tool_answer(use, llmcb_text(text));
}

/* A coroutine is a tool that waits without a thread. */
static llmcb_step wait_a_while(llmcb_task *t, llmcb_tool_use *use)
{
    int64_t seconds = 0;
    LLMCB_BEGIN(t);
    llmcb_tool_int(use, "seconds", &seconds);
    LLMCB_AWAIT(t, llmcb_sleep(t, seconds * 1000));
    if (t->result != LLMCB_OK) return t->result; /* cancelled */
    return llmcb_tool_answer(use, llmcb_text("done"));
    LLMCB_END(t);
}

static const llmcb_tool tools[] = {
    { .name = "get_weather",
      .description = "The weather of a city",
      .parameters = "{\"type\":\"object\",\"required\":[\"city\"],"
                    "\"properties\":{\"city\":{\"type\":\"string\"}}}",
      .call = get_weather,
      .handle_errors = true },
    { .name = "add",
      .description = "The sum of two numbers",
      .parameters = "{\"type\":\"object\",\"required\":[\"a\",\"b\"],"
                    "\"properties\":{\"a\":{\"type\":\"number\"},"
                    "\"b\":{\"type\":\"number\"}}}",
      .call = add,
      .handle_errors = true },
    { .name = "wait",
      .description = "Waits some seconds",
      .parameters = "{\"type\":\"object\",\"required\":[\"seconds\"],"
                    "\"properties\":{\"seconds\":{\"type\":\"integer\"}}}",
      .step = wait_a_while,
      .timeout_ms = 60000,
      .handle_errors = true }
};

static int on_action(llmcb_handler *h, const llmcb_event *ev)
{
    (void)h;
    printf("-> %s %s\n", ev->action->tool.ptr, ev->action->input.ptr);
    return 0;
}

static int on_tool_end(llmcb_handler *h, const llmcb_event *ev)
{
    (void)h;
    printf("<- %s: %s\n", ev->run->name, ev->output->text.ptr);
    return 0;
}

int main(int argc, char **argv)
{
    bool live = argc > 1 && strcmp(argv[1], "--live") == 0;
    const char *question = argc > 1 + live ? argv[1 + live]
                                           : "How is the weather in Paris, "
                                             "what is 17.5 + 24.5, and could "
                                             "you wait two seconds?";
    llmcb_handler handler = { .sync = { .on_agent_action = on_action,
                                        .on_tool_end = on_tool_end } };
    llmcb_handler *callbacks[] = { &handler };
    llmcb_config config = { .callbacks = callbacks, .n_callbacks = 1 };
    llmcb_message message = { .role = LLMCB_USER, .content = question };

    llmcb_loop_desc clock = { .virtual_clock = !live };
    llmcb_loop *loop = llmcb_loop_new(&clock);
    llmcb_replay_desc replay = { .path = "examples/recordings/agent.http" };
    llmcb_chat_desc desc = { .streaming = true };
    if (!live) desc.transport = llmcb_replay_new(loop, &replay);

    llmcb_chat *chat = llmcb_chat_new(loop, &desc);
    llmcb_agent_desc agent = { .chat = chat, .tools = tools, .n_tools = 3 };
    llmcb_op *op = llmcb_agent_start(&agent, &message, 1, &config);
    llmcb_code code = llmcb_op_wait(op);
    if (code == LLMCB_OK)
        printf("%s\n", llmcb_op_output(op)->text.ptr);
    else
        fprintf(stderr, "%s\n", llmcb_op_error(op)->message);

    llmcb_op_free(op);
    llmcb_chat_free(chat);
    llmcb_loop_free(loop);
    return code != LLMCB_OK;
}

/*
 * async_callbacks.c - the program of LangChain's async callbacks page
 *
 *     build/examples/async_callbacks          plays a recorded answer
 *     build/examples/async_callbacks --live   asks OpenAI: OPENAI_API_KEY
 */
#define LLMCB_IMPLEMENTATION
#include "llmcb.h"
#include <stdio.h>
#include <string.h>

#define RECORDING "examples/recordings/joke.http"

/* Sync: runs on the thread pool, where it may block. */
static int print_token(llmcb_handler *h, const llmcb_event *ev)
{
    (void)h;
    printf("Sync handler being called in a `thread_pool_executor`: "
           "token: %s\n", ev->token->text.ptr);
    return 0;
}

/* Async: a coroutine on the loop, which goes on while this one sleeps. */
static llmcb_step wake_up(llmcb_task *t, llmcb_handler *h,
                          const llmcb_event *ev)
{
    (void)h;
    LLMCB_BEGIN(t);
    puts("zzzz....");
    LLMCB_AWAIT(t, llmcb_sleep(t, 300));
    printf("Hi! I just woke up. Your llm is %s\n",
           ev->kind == LLMCB_LLM_END ? "ending" : "starting");
    LLMCB_END(t);
}

int main(int argc, char **argv)
{
    llmcb_handler sync_handler = {
        .sync = { .on_llm_new_token = print_token }
    };
    llmcb_handler async_handler = {
        .async = { .on_llm_start = wake_up, .on_llm_end = wake_up }
    };
    llmcb_handler *callbacks[] = { &sync_handler, &async_handler };

    llmcb_loop *loop = llmcb_loop_new(NULL);
    llmcb_transport *transport = NULL; /* the default: the network */
    if (argc < 2 || strcmp(argv[1], "--live") != 0)
        transport = llmcb_replay_new(loop, &(llmcb_replay_desc){
            .path = RECORDING });
    llmcb_chat *chat = llmcb_chat_new(loop, &(llmcb_chat_desc){
        .max_tokens = 25, .streaming = true, .transport = transport,
        .callbacks = callbacks, .n_callbacks = 2 });

    llmcb_op *op = llmcb_chat_generate(chat, &(llmcb_message){
        .role = LLMCB_USER, .content = "Tell me a joke" }, 1, NULL);
    llmcb_code code = llmcb_op_wait(op);
    if (code == LLMCB_OK)
        llmcb_result_print(llmcb_op_result(op), stdout);
    else
        fprintf(stderr, "%s\n", llmcb_op_error(op)->message);

    llmcb_op_free(op);
    llmcb_chat_free(chat);
    llmcb_loop_free(loop);
    return code != LLMCB_OK;
}

#!/bin/sh
# Breaks copies of llmcb.h in one place each and lets tests/test_walk.c look
# for it: shows what that finds. Part of the campaign, not of the gate.
#
#     tests/walk_mutants.sh [NAME]    (WALK=deep looks longer)
#
# A mutant is a name and a sed script, and a reason if it does no harm that
# could be found; "ok" is a mutant that is found, or not for that reason.

cd "$(dirname "$0")/.." || exit 1
dir=build/walk
mkdir -p $dir
flags=$(sed -n 's|^/\* build: \(.*\) \*/$|\1|p' tests/test_walk.c)
passed=0 failed=0 skipped=0

mutant() { # name, sed script, why it does no harm
    case $1 in *"$only"*) ;; *) return ;; esac
    sed "$2" llmcb.h >$dir/$1.h
    if cmp -s llmcb.h $dir/$1.h; then
        echo "not ok $1: changes nothing"
        failed=$((failed + 1))
        return
    fi
    # shellcheck disable=SC2086
    ${CC:-cc} -w -g -I. "-DWALK_HEADER=\"$PWD/$dir/$1.h\"" -o $dir/$1 \
        tests/test_walk.c -lpthread $flags 2>$dir/$1.out || {
        echo "not ok $1: does not compile: $(head -n 1 $dir/$1.out)"
        failed=$((failed + 1))
        return
    }
    if timeout 300 $dir/$1 >$dir/$1.out 2>&1; then
        if [ "$3" ]; then
            echo "ok $1: not found: $3"
            skipped=$((skipped + 1))
            rm -f $dir/$1 $dir/$1.h
            return
        fi
        echo "not ok $1: not found,$(tail -n 1 $dir/$1.out)"
        failed=$((failed + 1))
    else
        echo "ok $1:$(sed -n 's/^.*[0-9]: \([a-z]*\/\)/ \1/p' $dir/$1.out |
            head -n 1)"
        passed=$((passed + 1))
    fi
    rm -f $dir/$1 $dir/$1.h
}
in_function() { # name, command
    printf '%s\n' "/^static .*$1(.*[^;]\$/,/^}/{$2}"
}
only=$1

# -- wake-ups
mutant publish_signals_nobody \
    "$(in_function llmcbi_publish 's/pthread_cond_signal(&p->cond);/(void)0;/')"
mutant worker_wakes_no_sleeper \
    "$(in_function llmcbi_strand_run 's/llmcbi_wake_sleeper(loop);/(void)0;/')"
mutant worker_says_nothing_is_due \
    "$(in_function llmcbi_strand_run 's/loop->progress_due = true;//')"
mutant sleeper_gets_no_byte \
    "$(in_function llmcbi_wake_sleeper 's/llmcb_loop_wakeup(loop);//')"
mutant sleeping_is_not_reset \
    "$(in_function llmcbi_wake_sleeper 's/loop->sleeping = false;//;s/llmcb_loop_wakeup(loop);//')"
mutant sleeping_is_not_set \
    "$(in_function llmcbi_prepare 's/loop->sleeping = true;//')"
mutant sleeps_after_the_unlock \
    "$(in_function llmcbi_prepare '/loop->sleeping = true;/{N;s/\(.*\)\n\(.*\)/\2\n\1/;}')"
mutant sleeps_without_a_look_at_progress \
    "$(in_function llmcbi_prepare 's/loop->posts || loop->progress_due/loop->posts/')"
mutant sleeps_without_a_look_at_posts \
    "$(in_function llmcbi_prepare 's/loop->posts || loop->progress_due/loop->progress_due/')"
mutant drains_after_taking \
    "$(in_function llmcbi_process '/if (woken) llmcbi_drain/d;s/^    llmcbi_run_posts/    if (woken) llmcbi_drain_wakeups(loop);\n&/')" \
    "prepare looks again at all that a byte stands for"
mutant posts_wake_nobody \
    '/^LLMCBI_DEF llmcb_code llmcb_loop_post/,/^}/s/llmcbi_wake_sleeper(loop);//'
mutant stop_is_not_told \
    "$(in_function llmcbi_pool_join 's/pthread_cond_broadcast(&p->cond);//')"
mutant stop_tells_one \
    "$(in_function llmcbi_pool_join 's/pthread_cond_broadcast/pthread_cond_signal/')"
mutant leaves_without_a_word \
    "/^static void \*llmcbi_worker/,/^}/s/llmcb_loop_wakeup(loop);//"
# -- the mark
mutant mark_is_not_published \
    "$(in_function llmcbi_publish 's/  w->mark = run->mark;//')" \
    "a mark of 0 wakes the loop too often"
mutant mark_is_passed_over \
    "$(in_function llmcbi_strand_run 's/done >= w->mark/done > w->mark/')"
mutant no_mark_when_starved \
    "$(in_function llmcbi_run_set_mark 's/else if (run->starved)/else if (false)/')"
mutant no_mark_when_draining \
    "$(in_function llmcbi_run_set_mark 's/run->mark = run->head;/run->mark = UINT64_MAX;/')"
mutant no_mark_in_lock_step \
    "$(in_function llmcbi_run_set_mark 's/if (run->lockstep)/if (false)/')"
mutant new_mark_is_not_told \
    "$(in_function llmcbi_run_pump 's/(c->away->limit != llmcbi_cursor_limit(c) ||/c->away->limit != llmcbi_cursor_limit(c))/;s/c->away->mark != run->mark))//')"
# -- the mutex
mutant publishes_without_the_mutex \
    "$(in_function llmcbi_publish 's/llmcbi_lock(loop);//;s/llmcbi_unlock(loop);//')"
mutant publishes_half_without_it \
    "$(in_function llmcbi_publish 's/^    if (p \&\& p->n_idle.*/llmcbi_unlock(loop);\n&/;s/^    llmcbi_unlock(loop);$//')" \
    "an idle worker has looked before it waits"
mutant takes_without_the_mutex \
    "$(in_function llmcbi_process 's/llmcbi_lock(loop);//;s/llmcbi_unlock(loop);//')"
mutant takes_in_two_goes \
    "$(in_function llmcbi_process 's/    back = llmcbi_hear_progress.*/    llmcbi_unlock(loop);\n    llmcbi_lock(loop);\n&/')"
mutant due_is_reset_too_late \
    "$(in_function llmcbi_process '/loop->progress_due = false;/d;s/^    llmcbi_run_posts/    llmcbi_lock(loop);\n    loop->progress_due = false;\n    llmcbi_unlock(loop);\n&/')"
mutant job_is_started_without_it \
    "$(in_function llmcbi_strand_run 's/^    llmcbi_lock(loop);$//;s/^    llmcbi_unlock(loop);$//')"
# -- strands and cursors
mutant busy_stays \
    "$(in_function llmcbi_strand_run 's/w->busy = .*;/w->busy = true;/;s/if (w->busy) llmcbi_strand_add/if (done < w->limit) llmcbi_strand_add/')"
mutant busy_is_not_set \
    "$(in_function llmcbi_publish 's/w->busy = true;//')"
mutant queued_stays \
    "$(in_function llmcbi_strand_run 's/^    s->queued = false;//')"
mutant strand_is_not_queued_again \
    "$(in_function llmcbi_strand_run 's/^    if (s->first) {/    if (0) {/')"
mutant strand_is_queued_twice \
    "$(in_function llmcbi_strand_add 's/if (s->queued) return;//')"
mutant strands_are_not_shared \
    "$(in_function llmcbi_strand_get 's/if (s->handler == h)/if (0)/')"
mutant limit_is_not_looked_at_again \
    "$(in_function llmcbi_strand_run 's/done < w->limit;/done < stop;/')"
mutant batch_is_one_too_long \
    "$(in_function llmcbi_strand_run 's/while (done < stop/while (done <= stop/')"
mutant position_is_not_kept \
    "$(in_function llmcbi_strand_run 's/^    w->pos = pos;//')"
mutant hand_back_is_forgotten \
    "$(in_function llmcbi_strand_run 's/handed_back = true;//')"
mutant failure_is_forgotten \
    "$(in_function llmcbi_strand_run 's/w->failed = failed;/w->failed = 0;/')"
mutant in_progress_stays \
    "$(in_function llmcbi_hear_progress 's/w->in_progress = false;//')"
mutant back_too_early \
    "$(in_function llmcbi_hear_progress 's/if (w->busy) continue;/if (w->busy) { c->on_pool = false; continue; }/')"
mutant never_back \
    "$(in_function llmcbi_take_back 's/w->cursor->on_pool = false;//')"
mutant comes_back_at_the_second_look \
    "$(in_function llmcbi_hear_progress 's/if (w->busy) continue;.*//')$(printf '\n/^static void llmcbi_take_back/,/^}/s/on_pool = false/on_pool = w->busy/')"
mutant progress_before_posts \
    "$(in_function llmcbi_process '/llmcbi_run_posts(loop, posts);/d;s/^    llmcbi_run_timers/    llmcbi_run_posts(loop, posts);\n&/')" \
    "progress only marks runs ready; the pump comes later"
# -- runs
mutant finish_is_skipped \
    "$(in_function llmcbi_cursor_advance 's/if (run->skipping && c->done + 1 != run->finish_seq)/if (run->skipping)/;s/run->finish_seq - 1 : run->head/run->finish_seq : run->head/')"
mutant finish_without_a_start \
    "$(in_function llmcbi_cursor_advance 's/if (c->done == 0) c->mute = true;//')"
mutant skips_what_is_on_the_pool \
    "$(in_function llmcbi_cursor_advance 's/if (c->on_pool || c->running/if (c->running/')"
mutant skip_is_not_published \
    "$(in_function llmcbi_run_skip 's/if (run->cursors\[i\].on_pool)/if (0)/')" \
    "what was handed out may be told"
mutant cancelled_runs_go_on \
    "$(in_function llmcbi_cursor_limit 's/(run->skipping && !run->finish_seq)/false/')" \
    "what was handed out may be told"
mutant recycles_under_a_worker \
    "$(in_function llmcbi_run_recycle 's/ && llmcbi_run_off_pool(run)//;s/past >= run->first->next->first_seq/true/')"
mutant frees_under_a_worker \
    "$(in_function llmcbi_run_in_use 's/if (!llmcbi_run_off_pool(run)) return true;//')"
mutant settled_one_too_early \
    "$(in_function llmcbi_run_settled 's/run->slowest == run->head/run->slowest + 1 >= run->head/')"
mutant window_is_one_too_large \
    "/llmcbi_run_fits(const/,/^}/s/from < run->rules->window_events/from <= run->rules->window_events/"
mutant inline_is_not_first \
    "$(in_function llmcbi_run_pump '/run->visible = /d;s/^    while (moved) {/    run->visible = llmcbi_run_lockstep(run);\n&/')" \
    "inline handlers have gone as far as they can before"
mutant two_steps_at_once \
    "$(in_function llmcbi_run_lockstep 's/limit = c->done + 1/limit = c->done + 2/')"
mutant never_resumed \
    "$(in_function llmcbi_prompt_told 's/if (run->starved \&\& !p->over)/if (0)/')"
mutant interrupts_nobody \
    "$(in_function llmcbi_run_interrupt 's/^ *if (run->cursors.*/        continue;/;s/^ *llmcbi_task_cancel.*//')"
# -- cancels
mutant cancel_wakes_nobody \
    '/^LLMCBI_DEF void llmcb_op_cancel/,/^}/s/llmcb_loop_wakeup(op->loop);//'
mutant cancel_flags_in_the_wrong_order \
    "$(in_function llmcbi_op_want_cancel '/FLAG_SET(&op->cancel_wanted/{N;s/\(.*\)\n\(.*\)/\2\n\1/;}')"
mutant cancels_are_reset_after_the_look \
    "$(in_function llmcbi_take_cancels '/FLAG_SET(&loop->cancels, 0);/d;s/^}/    LLMCBI_FLAG_SET(\&loop->cancels, 0);\n}/')"
mutant cancel_wakes_before_it_says_why \
    '/^LLMCBI_DEF void llmcb_op_cancel/,/^}/{/op_want_cancel/{N;s/\(.*\)\n\(.*\)/\2\n\1/;}}'

echo "walk_mutants: $passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]

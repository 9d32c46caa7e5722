//! A build in the trace event format, which Perfetto (ui.perfetto.dev) and `chrome://tracing` show:
//! one process for what clients asked, one for what ran ahead, and an arrow from each primed result
//! to its use.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::timeline::{Span, Timeline, asked_span, executed_span};
use crate::cli::build_page::BuildPage;

/// The numbers of the two processes; the format knows all tracks by process and thread.
const CLIENT: u32 = 1;
const SPECULATIVE: u32 = 2;

/// The trace of `page`. Times are microseconds since its first moment.
pub fn of(page: &BuildPage) -> Value {
    let timeline = Timeline::of(page);
    let latest = page.latest_unix_ms();
    let since = |at: i64| (at - timeline.from_unix_ms) * 1000;
    let mut events = vec![
        name("process_name", CLIENT, 0, &page.label),
        name("process_name", SPECULATIVE, 0, "primed, ahead of time"),
        order(CLIENT),
        order(SPECULATIVE),
    ];
    for (process, lanes) in [
        (CLIENT, &timeline.client),
        (SPECULATIVE, &timeline.speculative),
    ] {
        for lane in 0..lanes.count {
            let title = format!("lane {}", lane + 1);
            events.push(name("thread_name", process, lane, &title));
        }
    }
    let critical_path: HashSet<usize> = timeline.critical_path.iter().copied().collect();
    for (index, action) in page.actions.iter().enumerate() {
        let (asked, primed) = (action.asked.as_ref(), action.primed.as_ref());
        let slice = |process: u32, lane: usize, span: Span, category: &str, args: Value| {
            // What took no time would not be drawn, and no arrow could hold on to it.
            let duration = ((span.to - span.from) * 1000).max(1);
            json!({
                "ph": "X", "name": action.label, "cat": category, "pid": process, "tid": lane,
                "ts": since(span.from), "dur": duration, "args": args,
            })
        };
        let client = timeline.client.of_action[index].zip(asked_span(action, latest));
        if let (Some((lane, span)), Some(asked)) = (client, asked) {
            let args = json!({
                "action": action.action,
                "answer": asked.answer,
                "executed_ms": asked.executed_ms,
                "critical_path": critical_path.contains(&index),
            });
            events.push(slice(CLIENT, lane, span, &asked.answer, args));
        }
        let ahead = timeline.speculative.of_action[index].zip(executed_span(action, latest));
        if let (Some((lane, span)), Some(primed)) = (ahead, primed) {
            let args = json!({
                "action": action.action,
                "base": action.base,
                "outcome": primed.outcome,
                "reason": primed.reason,
                "trigger": primed.trigger,
                "execution_ms": primed.execution_ms,
                "lead_ms": action.lead_ms(),
            });
            events.push(slice(SPECULATIVE, lane, span, &primed.outcome, args));
        }
        // From the execution to the client's call that it answered.
        if let (Some((from, executed)), Some((to, called))) = (ahead, client)
            && primed.is_some_and(|primed| primed.used_unix_ms.is_some())
        {
            let arrow = json!({ "name": "used", "cat": "used", "id": index });
            let end = |phase: &str, process, lane: usize, at: i64| {
                let mut end = arrow.clone();
                end["ph"] = phase.into();
                end["pid"] = json!(process);
                end["tid"] = lane.into();
                end["ts"] = since(at).into();
                end
            };
            events.push(end("s", SPECULATIVE, from, executed.from));
            let used = executed.from.clamp(called.from, called.to);
            let mut finish = end("f", CLIENT, to, used);
            // To the slice that holds this moment, rather than to the one that begins after it.
            finish["bp"] = "e".into();
            events.push(finish);
        }
    }
    json!({
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "producer": concat!("primed ", env!("CARGO_PKG_VERSION")),
            "build": page.id,
            "started_unix_ms": page.started_unix_ms,
            "left_out": page.left_out,
        },
    })
}

fn name(what: &str, process: u32, thread: usize, name: &str) -> Value {
    json!({ "ph": "M", "name": what, "pid": process, "tid": thread, "args": { "name": name } })
}

fn order(process: u32) -> Value {
    json!({
        "ph": "M", "name": "process_sort_index", "pid": process, "tid": 0,
        "args": { "sort_index": process },
    })
}

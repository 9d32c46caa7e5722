//! The journal of a build: what it asked for, how that was answered, and what was primed for it. The
//! engine writes it as it counts, off the path of calls: one small entry for each distinct action,
//! and what plans say of recorded ones. Names and everything else that people want to read is made
//! when somebody does (`Page`).

pub mod accounting;
pub(super) mod labels;
pub mod page;
pub mod store;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use self::accounting::{Asked, BuildStatus, Shortfall};
use self::labels::{Name, Names};
use self::page::{
    ActionEntry, AnswerWord, AskedEntry, ChangeEntry, OutcomeWord, Page, PrimedEntry, Trigger,
    UnusedWord,
};
use super::flights::FlightKey;
use super::flights::left_out::LeftOut;
use super::flights::record::{Course, FlightRecord};
use super::planning::verdict::{Change, Outlook, Verdict};
use super::records::parent::{BaseAction, WeakKey};
use crate::cas::transfer::Cas;
use crate::cas::{Digest, DigestFunction};
use crate::clock::millis;

/// Entries of one journal; further ones are counted.
const MAX_ENTRIES: usize = 200_000;
/// Entries of all journals in memory.
const MAX_ENTRIES_IN_ALL: usize = 500_000;

/// The share of one journal in all entries.
pub type Room = super::room::Room<MAX_ENTRIES_IN_ALL>;

/// What a build asked for, and what was primed for it.
#[derive(Clone, Debug, Default)]
pub struct Journal {
    asked: Vec<AskedFor>,
    /// By what they are executed as.
    adapted: HashMap<FlightKey, Planned>,
    /// Recorded actions of which the last plan says something else.
    others: HashMap<(WeakKey, Digest), Planned>,
    left_out: u64,
    room: Room,
}

/// An action that was asked for.
#[derive(Clone, Debug)]
struct AskedFor {
    key: FlightKey,
    began_unix_ms: i64,
    answered_unix_ms: i64,
    executed_ms: u32,
    answer: Asked,
}

/// A call about an action, as the journal notes it.
#[derive(Clone, Copy, Debug)]
pub struct Note {
    /// When it began.
    pub began_unix_ms: i64,
    /// When it was answered.
    pub answered_unix_ms: i64,
    /// How long the worker ran the action, as far as the answer says so.
    pub executed: Duration,
}

/// What a plan said of a recorded action.
#[derive(Clone, Debug)]
pub struct Planned {
    /// The last word on it.
    pub verdict: Verdict,
    /// When that was said: milliseconds since 1970.
    pub planned_unix_ms: i64,
    /// What made primed plan.
    pub trigger: Trigger,
    /// What became of it in flight.
    pub flight: Option<Arc<FlightRecord>>,
}

/// Where an action stands in the journal; nowhere, if there was no room.
#[derive(Clone, Copy, Debug)]
pub struct Line(Option<u32>);

impl Journal {
    /// An empty one that shares `room` with others.
    pub fn within(room: &Room) -> Self {
        Journal {
            room: room.clone(),
            ..Journal::default()
        }
    }

    /// Notes that an action was asked for, for the first time.
    pub fn ask(&mut self, key: &FlightKey, answer: Asked, note: Note) -> Line {
        if !self.has_room() {
            return Line(None);
        }
        self.asked.push(AskedFor {
            key: key.clone(),
            began_unix_ms: note.began_unix_ms,
            answered_unix_ms: note.answered_unix_ms,
            executed_ms: to_u32(note.executed),
            answer,
        });
        Line(u32::try_from(self.asked.len() - 1).ok())
    }

    /// Notes a further call about what was missed: the client has executed it, or joined.
    pub fn answer(&mut self, line: Line, answer: Asked, note: Note) {
        let asked = line.0.and_then(|line| self.asked.get_mut(line as usize));
        if let Some(asked) = asked {
            asked.answer = answer;
            asked.answered_unix_ms = note.answered_unix_ms;
            if !note.executed.is_zero() {
                asked.executed_ms = to_u32(note.executed);
            }
        }
    }

    /// Notes what a plan says.
    pub fn plan(&mut self, planned: Planned) {
        let place = (planned.verdict.parent, planned.verdict.base.digest);
        if let Outlook::Adapted(adaptation) = &planned.verdict.outlook {
            if let Some(known) = self.adapted.get_mut(&adaptation.key) {
                // It was foreseen before; what it was foreseen by first stays.
                known.flight = planned.flight.or(known.flight.take());
                if let Outlook::Adapted(before) = &mut known.verdict.outlook {
                    before.left_out = adaptation.left_out;
                }
            } else if self.has_room() {
                self.adapted.insert(adaptation.key.clone(), planned);
            }
            self.others.remove(&place);
        } else if self.others.contains_key(&place) || self.has_room() {
            self.others.insert(place, planned);
        }
    }

    /// Takes over what was planned before the build began.
    pub fn adopt(&mut self, earlier: Journal) {
        for planned in earlier.into_planned() {
            self.plan(planned);
        }
    }

    /// What was executed ahead of time, or is, as a recorded action of which parent.
    pub fn flights(&self) -> impl Iterator<Item = (WeakKey, &BaseAction, &Arc<FlightRecord>)> {
        self.adapted.values().filter_map(|planned| {
            let Verdict { parent, base, .. } = &planned.verdict;
            Some((*parent, &**base, planned.flight.as_ref()?))
        })
    }

    /// The parents for which something was planned.
    pub fn parents(&self) -> impl Iterator<Item = WeakKey> {
        let planned = self.adapted.values().chain(self.others.values());
        planned.map(|planned| planned.verdict.parent)
    }

    /// All that plans said.
    fn into_planned(self) -> impl Iterator<Item = Planned> {
        self.adapted.into_values().chain(self.others.into_values())
    }

    fn has_room(&mut self) -> bool {
        let entries = self.asked.len() + self.adapted.len() + self.others.len();
        let has_room = entries < MAX_ENTRIES && self.room.take(1);
        self.left_out += u64::from(!has_room);
        has_room
    }

    /// Whether anything that was planned for the build is still to be executed.
    pub fn is_in_flight(&self) -> bool {
        let mut flights = self.adapted.values().filter_map(|it| it.flight.as_ref());
        flights.any(|flight| !flight.is_over())
    }

    /// What cannot be adapted, or is not resolved, as far as plans have said.
    pub fn shortfall(&self) -> Shortfall {
        let mut shortfall = Shortfall::default();
        for planned in self.others.values() {
            let (reasons, word) = match &planned.verdict.outlook {
                Outlook::Unadaptable(word, _) => (&mut shortfall.unadaptable, *word),
                Outlook::Waits(_) => (&mut shortfall.unresolved, "waits_for_action"),
                Outlook::Unresolved(Some(_)) => (&mut shortfall.unresolved, "input_not_built"),
                Outlook::Unresolved(None) => (&mut shortfall.unresolved, "parent_not_built"),
                Outlook::Unchanged | Outlook::Adapted(_) => continue,
            };
            *reasons.entry(word.into()).or_default() += 1;
        }
        shortfall
    }

    /// Why the results that were primed for the build, which has ended and missed what is called
    /// `missed`, were not used.
    fn unused(&self, missed: &HashSet<String>) -> HashMap<&FlightKey, UnusedWord> {
        let asked: HashSet<&FlightKey> = self.asked.iter().map(|asked| &asked.key).collect();
        let place = |planned: &Planned| (planned.verdict.parent, planned.verdict.base.digest);
        let mut latest: HashMap<(WeakKey, Digest), i64> = HashMap::new();
        for planned in self.adapted.values() {
            let last = latest.entry(place(planned)).or_insert(i64::MIN);
            *last = (*last).max(planned.planned_unix_ms);
        }
        let unused = self.adapted.iter().filter(|(_, planned)| {
            let flown = planned.flight.as_ref().map(|flight| flight.flown());
            flown
                .is_some_and(|flown| flown.course == Course::Primed && flown.used_unix_ms.is_none())
        });
        let word = |key: &FlightKey, planned: &Planned| {
            let place = place(planned);
            let mut outputs = planned.verdict.base.outputs.iter();
            if asked.contains(key) {
                return UnusedWord::TooLate;
            }
            // An adaptation takes away what was said before, so this was said later.
            if latest[&place] > planned.planned_unix_ms || self.others.contains_key(&place) {
                UnusedWord::Superseded
            } else if outputs.any(|(path, _)| missed.contains(path)) {
                UnusedWord::AskedOtherwise
            } else {
                UnusedWord::NotAsked
            }
        };
        unused
            .map(|(key, planned)| (key, word(key, planned)))
            .collect()
    }

    /// Execution time of what was executed ahead of time and is not used.
    pub fn wasted(&self) -> Duration {
        let flights = self.adapted.values().filter_map(|it| it.flight.as_ref());
        let flown = flights.map(|flight| flight.flown());
        flown
            .filter(|flown| flown.course.is_over() && flown.used_unix_ms.is_none())
            .map(|flown| flown.execution)
            .sum()
    }

    /// The journal for people, of a build that stands as `build` says.
    pub async fn page(&self, mut build: BuildStatus, names: &Names, cas: &Cas) -> Page {
        let bases = self.others.values();
        let unplanned: HashMap<Digest, &Planned> = bases
            .map(|planned| (planned.verdict.base.digest, planned))
            .collect();
        let planned_as = |asked: &AskedFor| {
            let adapted = self.adapted.get(&asked.key);
            adapted.or_else(|| unplanned.get(&asked.key.action).copied())
        };
        let nameless = self.asked.iter();
        let nameless = nameless.filter(|asked| planned_as(asked).and_then(name_of).is_none());
        let nameless: Vec<FlightKey> = nameless.map(|asked| asked.key.clone()).collect();
        let names = names.of(cas, &nameless).await;
        let mut actions = Vec::with_capacity(self.asked.len() + self.adapted.len());
        let mut missed: HashSet<String> = HashSet::new();
        let mut seen: HashSet<&FlightKey> = HashSet::new();
        let mut seen_bases: HashSet<Digest> = HashSet::new();
        for asked in &self.asked {
            let planned = planned_as(asked);
            let name = match planned.and_then(name_of) {
                Some(name) => name,
                None => match names.get(&asked.key) {
                    Some(name) => name.as_ref().clone(),
                    None => Name::of_unknown(asked.key.action),
                },
            };
            if asked.answer == Asked::Missed {
                missed.extend(name.outputs.iter().chain([&name.label]).cloned());
            }
            seen.insert(&asked.key);
            seen_bases.extend(planned.map(|planned| planned.verdict.base.digest));
            let mut entry = entry(&asked.key.instance, asked.key.action, name);
            entry.asked = Some(asked_entry(asked));
            if let Some(planned) = planned {
                entry.base = Some(planned.verdict.base.digest.to_string());
                entry.primed = Some(primed_entry(planned));
            }
            actions.push(entry);
        }
        let unused = match build.ended_unix_ms {
            Some(_) => self.unused(&missed),
            None => HashMap::new(),
        };
        let mut shortfall = self.shortfall();
        for word in unused.values() {
            *shortfall.unused.entry(word.word().into()).or_default() += 1;
        }
        build.accounting.fall_short(shortfall);
        for (entry, asked) in actions.iter_mut().zip(&self.asked) {
            if let Some(primed) = &mut entry.primed {
                primed.unused = unused.get(&asked.key).copied();
            }
        }
        let adapted = self.adapted.iter().filter(|(key, _)| !seen.contains(key));
        let mut rest: Vec<(&str, Digest, &Planned, Option<UnusedWord>)> = adapted
            .map(|(key, planned)| {
                (
                    &*key.instance,
                    key.action,
                    planned,
                    unused.get(key).copied(),
                )
            })
            .collect();
        // What is as it was and was not asked for says nothing, unless something else was asked
        // for in its place.
        let others = self.others.iter().filter(|((_, base), planned)| {
            let base_outputs = &planned.verdict.base.outputs;
            let mut outputs = base_outputs.iter().map(|(path, _)| path);
            !seen_bases.contains(base)
                && (!matches!(planned.verdict.outlook, Outlook::Unchanged)
                    || outputs.any(|path| missed.contains(path)))
        });
        rest.extend(others.map(|((_, base), planned)| ("", *base, planned, None)));
        rest.sort_by_key(|(_, action, planned, _)| (planned.verdict.base.order, *action));
        for (instance, action, planned, unused) in rest {
            let name = name_of(planned).unwrap_or_else(|| Name::of_unknown(action));
            let mut entry = entry(instance, action, name);
            entry.base = Some(planned.verdict.base.digest.to_string());
            entry.primed = Some(PrimedEntry {
                unused,
                ..primed_entry(planned)
            });
            actions.push(entry);
        }
        Page {
            build,
            actions,
            left_out: self.left_out,
        }
    }
}

fn to_u32(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

fn name_of(planned: &Planned) -> Option<Name> {
    Name::of_recorded(&planned.verdict.base)
}

fn entry(instance: &str, action: Digest, name: Name) -> ActionEntry {
    let function = action.function();
    ActionEntry {
        action: action.to_string(),
        label: name.label,
        outputs: name.outputs,
        instance: instance.to_owned(),
        digest_function: (function == DigestFunction::Blake3).then(|| function.to_string()),
        ..ActionEntry::default()
    }
}

fn asked_entry(asked: &AskedFor) -> AskedEntry {
    AskedEntry {
        at_unix_ms: asked.began_unix_ms,
        answered_unix_ms: asked.answered_unix_ms,
        answer: match asked.answer {
            Asked::Cached => AnswerWord::Cached,
            Asked::Hit => AnswerWord::Hit,
            Asked::Joined => AnswerWord::Joined,
            Asked::Missed => AnswerWord::Missed,
        },
        executed_ms: asked.executed_ms.into(),
    }
}

fn primed_entry(planned: &Planned) -> PrimedEntry {
    let base = &planned.verdict.base;
    let mut entry = PrimedEntry {
        planned_unix_ms: planned.planned_unix_ms,
        started_unix_ms: None,
        ended_unix_ms: None,
        outcome: OutcomeWord::Unchanged,
        reason: None,
        execution_ms: 0,
        used_unix_ms: None,
        unused: None,
        trigger: planned.trigger,
        changes: Vec::new(),
        changes_left_out: 0,
        after: Vec::new(),
        recorded_unix_ms: base.last_seen_unix_ms,
        recorded_ms: millis(base.duration),
    };
    let texts = |digests: &[Digest]| digests.iter().map(Digest::to_string).collect();
    match &planned.verdict.outlook {
        Outlook::Unchanged => {}
        Outlook::Adapted(adaptation) => {
            entry.changes = adaptation.changes.iter().map(change_entry).collect();
            entry.changes_left_out = adaptation.changes_left_out;
            entry.after = texts(&adaptation.after);
            match (&planned.flight, &adaptation.left_out) {
                (Some(flight), _) => add_flight(&mut entry, flight),
                (None, Some(left_out)) => {
                    entry.reason = Some(left_out.to_string());
                    entry.outcome = match left_out {
                        LeftOut::Retired(_) => OutcomeWord::Retired,
                        LeftOut::Cheap { .. } => OutcomeWord::Cheap,
                        LeftOut::OverBudget(_) => OutcomeWord::OverBudget,
                    };
                }
                (None, None) => {
                    entry.outcome = OutcomeWord::Abandoned;
                    let reason = "a client was executing it already";
                    entry.reason = Some(reason.to_owned());
                }
            }
        }
        Outlook::Waits(after) => {
            entry.outcome = OutcomeWord::Unresolved;
            let reason = "it reads what other actions write, and these were not done";
            entry.reason = Some(reason.to_owned());
            entry.after = texts(after);
        }
        Outlook::Unresolved(path) => {
            entry.outcome = OutcomeWord::Unresolved;
            entry.reason = Some(match path {
                Some(path) => format!("its input {path} is made by what had not been built"),
                None => "what it runs in had not been built".to_owned(),
            });
        }
        Outlook::Unadaptable(_, reason) => {
            entry.outcome = OutcomeWord::Unadaptable;
            entry.reason = Some(reason.clone());
        }
    }
    entry
}

fn add_flight(entry: &mut PrimedEntry, flight: &FlightRecord) {
    let flown = flight.flown();
    entry.planned_unix_ms = entry.planned_unix_ms.min(flown.announced_unix_ms);
    entry.started_unix_ms = flown.started_unix_ms;
    entry.ended_unix_ms = flown.ended_unix_ms;
    entry.execution_ms = millis(flown.execution);
    entry.used_unix_ms = flown.used_unix_ms;
    entry.reason = flown.reason;
    entry.outcome = match flown.course {
        Course::Queued => OutcomeWord::Queued,
        Course::Running => OutcomeWord::Running,
        Course::Primed => OutcomeWord::Primed,
        Course::Cached => OutcomeWord::Cached,
        Course::Failed => OutcomeWord::Failed,
        Course::Abandoned => OutcomeWord::Abandoned,
    };
}

fn change_entry(change: &Arc<Change>) -> ChangeEntry {
    ChangeEntry {
        path: change.path.clone(),
        from: change.from.map(|digest| digest.to_string()),
        to: change.to.map(|digest| digest.to_string()),
        by: change.by,
        origin: change.origin.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cas::memory::Memory;
    use crate::speculation::clients::builds::Build;
    use crate::speculation::clients::callers::Callers;
    use crate::speculation::clients::observation::CallOrigin;
    use crate::speculation::flights::Ending;
    use crate::speculation::planning::verdict::{Adaptation, By};
    use crate::speculation::records::parent::fixture;
    use crate::workspace::peer::{Peer, PeerOrigin};
    use bytes::Bytes;

    fn key(name: &str) -> FlightKey {
        FlightKey {
            instance: "".into(),
            action: Digest::of(name.as_bytes()),
        }
    }

    fn note(at: i64) -> Note {
        Note {
            began_unix_ms: at,
            answered_unix_ms: at + 5,
            executed: Duration::ZERO,
        }
    }

    /// What a plan says of the recorded action `name`, which writes `name.o`.
    fn planned(name: &str, outlook: Outlook, flight: Option<Arc<FlightRecord>>) -> Planned {
        let mut base = fixture::base(name, Digest::of(b"root"));
        base.outputs = vec![(format!("{name}.o"), Digest::of(b"object"))];
        Planned {
            verdict: Verdict {
                parent: WeakKey([1; 32]),
                base: Arc::new(base),
                outlook,
            },
            planned_unix_ms: 7,
            trigger: Trigger::Workspace,
            flight,
        }
    }

    fn adapted(as_what: &str) -> Outlook {
        let change = Change::new("a.h".to_owned(), None, Some(Digest::of(b"a")), None);
        Outlook::Adapted(Adaptation {
            key: key(as_what),
            changes: vec![Arc::new(change)],
            changes_left_out: 0,
            after: Vec::new(),
            left_out: None,
        })
    }

    fn flown() -> Arc<FlightRecord> {
        let flight = FlightRecord::announced(Digest::of(b"action"));
        flight.start();
        flight.executed_for(Duration::from_secs(2));
        flight.end(&Ending::Succeeded(Bytes::new()));
        Arc::new(flight)
    }

    async fn page(journal: &Journal) -> Page {
        page_of(journal, None).await
    }

    async fn page_of(journal: &Journal, ended_unix_ms: Option<i64>) -> Page {
        let origin = CallOrigin {
            peer: Arc::new(Peer::new(PeerOrigin::Local { pid: None, uid: 0 })),
            metadata: None,
        };
        let caller = Callers::new().of(&origin, |_| false);
        let mut build = Build::new(1, caller, 0, &Room::default()).status();
        build.ended_unix_ms = ended_unix_ms;
        let cas = Cas::new(Memory::holding([]));
        let page = journal.page(build, &Names::default(), &cas).await;
        let json = serde_json::to_string(&page).unwrap();
        assert_eq!(serde_json::from_str::<Page>(&json).unwrap(), page);
        page
    }

    #[tokio::test]
    async fn what_was_asked_for_stands_with_what_was_primed_for_it() {
        let mut journal = Journal::default();
        let flight = flown();
        journal.plan(planned("a", adapted("a'"), Some(flight.clone())));
        journal.plan(planned("b", Outlook::Unchanged, None));
        journal.plan(planned("c", Outlook::Unchanged, None));
        journal.ask(&key("a'"), Asked::Hit, note(10));
        journal.ask(&key("b"), Asked::Cached, note(20));
        let line = journal.ask(&key("d"), Asked::Missed, note(30));
        let executed = Note {
            executed: Duration::from_millis(40),
            ..note(100)
        };
        journal.answer(line, Asked::Missed, executed);
        assert_eq!(journal.wasted(), Duration::from_secs(2));
        flight.used(i64::MAX);
        assert_eq!(journal.wasted(), Duration::ZERO);
        let page = page(&journal).await;
        let [a, b, d] = page.actions.as_slice() else {
            panic!("c says nothing: {page:?}");
        };
        assert_eq!((a.label.as_str(), b.label.as_str()), ("a.o", "b.o"));
        assert_eq!(a.base, Some(Digest::of(b"a").to_string()));
        let primed = a.primed.as_ref().unwrap();
        assert_eq!(primed.outcome, OutcomeWord::Primed);
        assert_eq!(primed.execution_ms, 2000);
        assert_eq!(
            (primed.changes[0].by, &primed.changes[0].from),
            (By::Observed, &None)
        );
        let unchanged = b.primed.as_ref().map(|primed| primed.outcome);
        assert_eq!(unchanged, Some(OutcomeWord::Unchanged));
        let asked = d.asked.as_ref().unwrap();
        assert_eq!(
            (asked.at_unix_ms, asked.answered_unix_ms, asked.executed_ms),
            (30, 105, 40)
        );
        assert_eq!(d.primed, None);
    }

    #[tokio::test]
    async fn the_last_word_of_plans_counts_and_what_was_primed_in_vain_stays() {
        let mut journal = Journal::default();
        journal.plan(planned("a", adapted("a'"), Some(flown())));
        journal.plan(planned("a", adapted("a''"), None));
        journal.plan(planned(
            "b",
            Outlook::Unresolved(Some("x.h".to_owned())),
            None,
        ));
        journal.plan(planned(
            "b",
            Outlook::Unadaptable("input_vanished", "it is gone".to_owned()),
            None,
        ));
        let page = page(&journal).await;
        let outcomes: Vec<_> = page
            .actions
            .iter()
            .filter_map(|it| it.primed.as_ref())
            .collect();
        let mut outcomes: Vec<_> = outcomes.iter().map(|it| (it.outcome, &it.reason)).collect();
        outcomes.sort_by_key(|(outcome, _)| *outcome as u8);
        let busy = Some("a client was executing it already".to_owned());
        let gone = Some("it is gone".to_owned());
        let expected = [
            (OutcomeWord::Primed, &None),
            (OutcomeWord::Abandoned, &busy),
            (OutcomeWord::Unadaptable, &gone),
        ];
        assert_eq!(outcomes, expected);
    }

    #[tokio::test]
    async fn what_is_not_to_be_had_is_counted_by_reason_and_what_is_not_used_when_it_has_ended() {
        let mut journal = Journal::default();
        let later = |planned: Planned| Planned {
            planned_unix_ms: 8,
            ..planned
        };
        let used = flown();
        used.used(i64::MAX);
        journal.plan(planned("used", adapted("used'"), Some(used)));
        journal.plan(planned("edited", adapted("edited'"), Some(flown())));
        journal.plan(later(planned("edited", adapted("edited''"), Some(flown()))));
        journal.plan(planned("reverted", adapted("reverted'"), Some(flown())));
        journal.plan(planned("reverted", Outlook::Unchanged, None));
        journal.plan(planned("other", adapted("other'"), Some(flown())));
        let mut asked = planned("asked", Outlook::Unchanged, None);
        Arc::make_mut(&mut asked.verdict.base).outputs =
            vec![("other.o".to_owned(), Digest::of(b""))];
        journal.plan(asked);
        journal.ask(&key("asked"), Asked::Missed, note(10));
        journal.plan(planned("late", adapted("late'"), Some(flown())));
        journal.ask(&key("late'"), Asked::Missed, note(10));
        journal.plan(planned(
            "gone",
            Outlook::Unadaptable("input_vanished", "gone".to_owned()),
            None,
        ));
        journal.plan(planned("waits", Outlook::Waits(Vec::new()), None));
        journal.plan(planned("unbuilt", Outlook::Unresolved(None), None));
        let shortfall = |page: &Page| {
            let accounting = &page.build.accounting;
            let reasons = [
                &accounting.unadaptable,
                &accounting.unresolved,
                &accounting.unused,
            ];
            reasons.map(|reasons| {
                let reasons = reasons.iter();
                reasons
                    .map(|(reason, count)| format!("{reason} {count}"))
                    .collect::<Vec<_>>()
            })
        };
        let none: &[&str] = &[];
        let open = [
            &["input_vanished 1"][..],
            &["parent_not_built 1", "waits_for_action 1"],
            none,
        ];
        assert_eq!(shortfall(&page(&journal).await), open);
        let page = page_of(&journal, Some(20)).await;
        let ended = [
            "asked_otherwise 1",
            "not_asked 1",
            "superseded 2",
            "too_late 1",
        ];
        assert_eq!(shortfall(&page)[2], ended);
        let unused = |base: &[u8]| {
            let base = Some(Digest::of(base).to_string());
            let entries = page.actions.iter().filter(|entry| entry.base == base);
            let mut unused: Vec<_> = entries
                .filter_map(|entry| entry.primed.as_ref()?.unused)
                .map(UnusedWord::word)
                .collect();
            unused.sort_unstable();
            unused
        };
        assert_eq!(unused(b"used"), none);
        assert_eq!(unused(b"edited"), ["not_asked", "superseded"]);
        assert_eq!(unused(b"other"), ["asked_otherwise"]);
        assert_eq!(unused(b"late"), ["too_late"]);
    }

    #[test]
    fn journals_share_a_bounded_room_and_count_what_they_leave_out() {
        let room = Room::default();
        let mut first = Journal::within(&room);
        let mut second = Journal::within(&room);
        let mut number = 0;
        for journal in [&mut first, &mut second] {
            for _ in 0..MAX_ENTRIES + 10 {
                number += 1;
                journal.ask(&key(&number.to_string()), Asked::Cached, note(0));
            }
            assert_eq!((journal.asked.len(), journal.left_out), (MAX_ENTRIES, 10));
        }
        let mut third = Journal::within(&room);
        for _ in 0..MAX_ENTRIES {
            third.ask(&key("x"), Asked::Cached, note(0));
        }
        assert_eq!(third.asked.len(), MAX_ENTRIES_IN_ALL - 2 * MAX_ENTRIES);
        drop(first.clone());
        drop(second);
        let before = third.asked.len();
        third.ask(&key("x"), Asked::Cached, note(0));
        assert_eq!(third.asked.len(), before + 1, "what is dropped makes room");
    }
}

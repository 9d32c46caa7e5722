//! The table: for each figure the median over the rounds, its ratio to a direct connection within
//! each round, and whether what primed promises is kept. Rounds interleave the subjects, so a
//! ratio within a round says more than a ratio of medians: what else the machine did is in both.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use serde_json::{Map, Value, json};

use crate::Result;

#[derive(clap::Args)]
pub struct Report {
    /// The lines that `load` printed; each has the tags `figure`, `subject` and `round`.
    measurements: PathBuf,
    /// Also write all of it here.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// One line of the table.
struct Row {
    label: &'static str,
    figure: &'static str,
    metric: &'static str,
    unit: &'static str,
    better: Better,
    floors: &'static [Floor],
}

#[derive(Clone, Copy, PartialEq)]
enum Better {
    Less,
    More,
}

/// What is promised of a figure for primed, in the direction that is better.
#[derive(Clone, Copy)]
enum Floor {
    /// Times what `subject` has.
    Of(&'static str, f64),
    /// Times what `subject` adds to a direct connection.
    Added(&'static str, f64),
    /// In the row's own unit.
    Plain(f64),
}

use Better::{Less, More};
use Floor::{Added, Of, Plain};

const ROWS: &[Row] = &[
    Row {
        label: "lookup hit on casd, one at a time: p50",
        figure: "lookup",
        metric: "p50_us",
        unit: "µs",
        better: Less,
        floors: &[
            Of("direct", 1.6),
            Added("nginx", 0.85),
            Added("haproxy", 0.85),
            Of("none", 1.05),
        ],
    },
    Row {
        label: "lookup hit on casd, one at a time: p99",
        figure: "lookup",
        metric: "p99_us",
        unit: "µs",
        better: Less,
        floors: &[Of("direct", 1.65)],
    },
    Row {
        label: "lookup hits on casd, 64 connections",
        figure: "connections",
        metric: "per_s",
        unit: "/s",
        better: More,
        floors: &[
            Of("direct", 0.62),
            Of("nginx", 1.1),
            Of("haproxy", 1.1),
            Of("none", 0.93),
        ],
    },
    Row {
        label: "lookup hits on casd, 64 streams",
        figure: "streams",
        metric: "per_s",
        unit: "/s",
        better: More,
        floors: &[
            Of("direct", 0.90),
            Of("nginx", 1.1),
            Of("haproxy", 1.1),
            Of("none", 0.93),
        ],
    },
    Row {
        label: "new connection and one lookup: p50",
        figure: "connect",
        metric: "p50_us",
        unit: "µs",
        better: Less,
        floors: &[Of("direct", 1.85), Of("nginx", 1.0), Of("haproxy", 1.0)],
    },
    Row {
        label: "proxy's CPU per lookup, 64 streams",
        figure: "cpu-lookup",
        metric: "cpu_us",
        unit: "µs",
        better: Less,
        floors: &[Plain(6.0)],
    },
    Row {
        label: "proxy's CPU per unknown call, 64 streams",
        figure: "cpu-echo",
        metric: "cpu_us",
        unit: "µs",
        better: Less,
        floors: &[Plain(6.0)],
    },
    Row {
        label: "ByteStream.Read of 256 MiB from casd",
        figure: "read",
        metric: "mb_per_s",
        unit: "MB/s",
        better: More,
        floors: &[Of("direct", 0.88), Of("nginx", 1.0), Of("haproxy", 1.25)],
    },
    stream("stream down, 64 KiB messages", "down-64k", FAST),
    stream("stream down, 1 MiB messages", "down-1m", FAST),
    stream("stream up, 64 KiB messages", "up-64k", FAST),
    stream("stream up, 1 MiB messages", "up-1m", FAST),
    stream(
        "16 KiB frames: down, 64 KiB messages",
        "small-down-64k",
        SMALL,
    ),
    stream(
        "16 KiB frames: down, 1 MiB messages",
        "small-down-1m",
        SMALL,
    ),
    stream("16 KiB frames: up, 64 KiB messages", "small-up-64k", SMALL),
    stream("16 KiB frames: up, 1 MiB messages", "small-up-1m", SMALL),
    stream("over 20 ms: down, 1 MiB messages", "far-down-1m", FAR),
    stream("over 20 ms: up, 1 MiB messages", "far-up-1m", FAR),
    Row {
        label: "lookup during a download (fast): p50",
        figure: "during-fast",
        metric: "p50_us",
        unit: "µs",
        better: Less,
        floors: &[Of("direct", 1.5)],
    },
    Row {
        label: "lookup during a download (casd): p50",
        figure: "during-casd",
        metric: "p50_us",
        unit: "µs",
        better: Less,
        floors: &[Of("direct", 1.5)],
    },
    Row {
        label: "memory per idle connection, of 1,000",
        figure: "idle",
        metric: "kib_each",
        unit: "KiB",
        better: Less,
        floors: &[Plain(70.0)],
    },
    Row {
        label: "memory per open stream, of 10,000",
        figure: "open",
        metric: "kib_each",
        unit: "KiB",
        better: Less,
        floors: &[],
    },
    Row {
        label: "memory per stalled stream, of 32",
        figure: "stalled",
        metric: "kib_each",
        unit: "KiB",
        better: Less,
        floors: &[Plain(2.2 * 1024.0)],
    },
    Row {
        label: "recc, a cache hit, the whole process",
        figure: "recc",
        metric: "ms",
        unit: "ms",
        better: Less,
        floors: &[Of("direct", 1.03)],
    },
];

const FAST: &[Floor] = &[Of("direct", 0.45), Of("nginx", 1.1), Of("haproxy", 1.1)];
const SMALL: &[Floor] = &[Of("direct", 0.40)];
const FAR: &[Floor] = &[Of("direct", 0.6)];

const fn stream(label: &'static str, figure: &'static str, floors: &'static [Floor]) -> Row {
    Row {
        label,
        figure,
        metric: "mb_per_s",
        unit: "MB/s",
        better: More,
        floors,
    }
}

/// The columns, in this order, as far as they were measured.
const SUBJECTS: &[&str] = &[
    "direct", "primed", "none", "pipe", "nginx", "haproxy", "casd",
];

/// The values of one row: by subject, by round.
type Values<'a> = BTreeMap<&'a str, BTreeMap<u64, f64>>;

impl Report {
    pub fn run(self) -> Result<()> {
        let text = fs::read_to_string(&self.measurements)?;
        let lines: Vec<Value> = text
            .lines()
            .map(serde_json::from_str)
            .collect::<Result<_, _>>()?;
        let measured: BTreeSet<&str> = lines
            .iter()
            .filter_map(|line| line["subject"].as_str())
            .collect();
        let subjects: Vec<&str> = SUBJECTS
            .iter()
            .copied()
            .filter(|name| measured.contains(name))
            .collect();

        let mut table = format!("{:<42}{:>10}{:>10}", "", "", "direct");
        for subject in subjects.iter().filter(|name| **name != "direct") {
            write!(table, "{subject:>9}")?;
        }
        table.push('\n');
        let mut floors = String::new();
        let mut rows = Vec::new();
        for row in ROWS {
            let values = row.values(&lines);
            if !values.is_empty() {
                row.print(&mut table, &values, &subjects)?;
                row.print_floors(&mut floors, &values)?;
                rows.push(row.tell(&values));
            }
        }
        println!("{table}\nWhat primed promises\n\n{floors}");
        let failed = lines.iter().filter(|line| line["failed"] == true).count();
        if failed > 0 {
            println!("{failed} measurements failed; what they said is above the table.");
        }
        if let Some(file) = self.json {
            let all = json!({ "rows": rows, "failed": failed, "measurements": lines });
            fs::write(file, serde_json::to_string_pretty(&all)?)?;
        }
        Ok(())
    }
}

impl Row {
    fn values<'a>(&self, lines: &'a [Value]) -> Values<'a> {
        let mut values = Values::new();
        for line in lines.iter().filter(|line| line["figure"] == self.figure) {
            let place = (line["subject"].as_str(), line["round"].as_u64());
            if let ((Some(subject), Some(round)), Some(value)) = (place, line[self.metric].as_f64())
            {
                values.entry(subject).or_default().insert(round, value);
            }
        }
        values
    }

    /// Ratios where there is something direct to compare with, values where there is not.
    fn print(&self, table: &mut String, values: &Values, subjects: &[&str]) -> Result<()> {
        let shown = |value: Option<f64>, decimals| match value {
            Some(value) => format!("{value:.decimals$}"),
            None => "–".into(),
        };
        let direct = values
            .get("direct")
            .and_then(|direct| median(direct.values().copied()));
        write!(table, "{:<42}{:>10}", self.label, self.unit)?;
        write!(
            table,
            "{:>10}",
            shown(direct, if direct < Some(1000.0) { 1 } else { 0 })
        )?;
        for subject in subjects.iter().filter(|name| **name != "direct") {
            let cell = match direct {
                Some(_) => shown(ratio(values, subject, "direct"), 2),
                None => shown(
                    values
                        .get(subject)
                        .and_then(|own| median(own.values().copied())),
                    1,
                ),
            };
            write!(table, "{cell:>9}")?;
        }
        table.push('\n');
        Ok(())
    }

    fn print_floors(&self, table: &mut String, values: &Values) -> Result<()> {
        let sign = if self.better == Less { '≤' } else { '≥' };
        for floor in self.floors {
            let Some((value, met)) = floor.judge(values, self.better) else {
                continue;
            };
            let met = if met { "met" } else { "MISSED" };
            let (limit, of) = floor.words();
            writeln!(
                table,
                "{:<42}{value:>10.3}  {sign} {limit:<7}{of:<26}{met}",
                self.label
            )?;
        }
        Ok(())
    }

    fn tell(&self, values: &Values) -> Value {
        let mut subjects = Map::new();
        for (subject, own) in values {
            let told = json!({
                "median": median(own.values().copied()),
                "to_direct": ratio(values, subject, "direct"),
                "rounds": own.len(),
            });
            subjects.insert((*subject).into(), told);
        }
        let floors = self.floors.iter().filter_map(|floor| {
            let (value, met) = floor.judge(values, self.better)?;
            let (limit, of) = floor.words();
            Some(json!({ "limit": limit, "of": of, "value": value, "met": met }))
        });
        json!({
            "label": self.label,
            "figure": self.figure,
            "metric": self.metric,
            "unit": self.unit,
            "less_is_better": self.better == Less,
            "subjects": subjects,
            "floors": floors.collect::<Vec<_>>(),
        })
    }
}

impl Floor {
    /// The limit, and what it is a multiple of.
    fn words(self) -> (f64, String) {
        match self {
            Of(subject, limit) => (limit, format!("of {subject}")),
            Added(subject, limit) => (limit, format!("of what {subject} adds")),
            Plain(limit) => (limit, String::new()),
        }
    }

    /// What was measured, and whether the floor is met; `None` if a part of it was not measured.
    fn judge(self, values: &Values, better: Better) -> Option<(f64, bool)> {
        let (value, limit) = match self {
            Of(subject, limit) => (ratio(values, "primed", subject)?, limit),
            Added(subject, limit) => (added(values, subject)?, limit),
            Plain(limit) => (median(values.get("primed")?.values().copied())?, limit),
        };
        let met = if better == Less {
            value <= limit
        } else {
            value >= limit
        };
        Some((value, met))
    }
}

/// The median of the rounds' ratios of `subject` to `base`.
fn ratio(values: &Values, subject: &str, base: &str) -> Option<f64> {
    let (subject, base) = (values.get(subject)?, values.get(base)?);
    median(
        subject
            .iter()
            .filter_map(|(round, value)| Some(value / base.get(round)?)),
    )
}

/// The median of the rounds' ratios of what primed adds to what `peer` adds.
fn added(values: &Values, peer: &str) -> Option<f64> {
    let [primed, peer, direct] = ["primed", peer, "direct"].map(|name| values.get(name));
    let (peer, direct) = (peer?, direct?);
    median(primed?.iter().filter_map(|(round, value)| {
        let direct = direct.get(round)?;
        Some((value - direct) / (peer.get(round)? - direct))
    }))
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    Some(match sorted.len() % 2 {
        1 => upper,
        _ => (sorted[middle - 1] + upper) / 2.0,
    })
}

//! Why something is not executed ahead of time although it is known what it would be.

use std::fmt;
use std::time::Duration;

/// Why an action is not executed ahead of time although it is known what it would be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeftOut {
    /// So many executions of it in a row were wasted.
    Retired(u8),
    /// There is too little to gain.
    Cheap {
        /// How long it took.
        recorded: Duration,
        /// What executing it takes beside that.
        overhead: Duration,
        /// How many executions of it in a row were wasted.
        wasted: u8,
    },
    /// The budget of this flag is spent.
    OverBudget(&'static str),
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LeftOut::Retired(wasted) => write!(
                f,
                "nobody has used its result the last {wasted} times; it comes back when a build \
                 asks for it"
            ),
            LeftOut::Cheap {
                recorded,
                overhead,
                wasted,
            } => write!(
                f,
                "it takes {} ms, and was not used the last {}; to execute it ahead of time costs \
                 {} ms",
                recorded.as_millis(),
                match wasted {
                    1 => "time".to_owned(),
                    wasted => format!("{wasted} times"),
                },
                overhead.as_millis()
            ),
            LeftOut::OverBudget(flag) => write!(f, "what {flag} allows was spent"),
        }
    }
}

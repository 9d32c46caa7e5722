//! Tests of the whole: primed as its users run it, with real recc and buildbox-casd.

mod examples;
mod local_cas;
mod project;
mod rebuild;
mod support;

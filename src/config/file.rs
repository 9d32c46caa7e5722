//! `primed.toml`: where it stands, and what stands in it, each value with its place. What the keys
//! mean is not known here; the command line (`cli::settings`) knows its flags.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::{fmt, io};

use toml::de::{DeTable, DeValue};

use super::Environment;

/// What `--config` says where no file is to be read.
pub const NONE: &str = "none";

/// A place in a file, counted from 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub file: PathBuf,
    /// The line.
    pub line: usize,
    /// The character in it.
    pub column: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.file.display(), self.line, self.column)
    }
}

/// A value as the flag of that name would take it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// `true` or `false`.
    Switch(bool),
    /// A string or a number.
    Text(String),
    /// Several of those.
    List(Vec<String>),
    /// What no flag takes; says what it is.
    Other(&'static str),
}

/// One line of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The command that it is for; `None` for all that know the flag.
    pub command: Option<String>,
    /// The flag, without dashes.
    pub key: String,
    /// Where the key stands.
    pub key_at: Place,
    /// What it is set to.
    pub value: Value,
    /// Where that stands.
    pub value_at: Place,
}

/// What a file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConfigFile {
    /// Where it stands.
    pub path: PathBuf,
    /// Its settings, in no order.
    pub entries: Vec<Entry>,
    /// Its tables: a command's name, and where it stands.
    pub tables: Vec<(String, Place)>,
}

/// Why a file cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigFileError {
    /// It cannot be read.
    #[error("the configuration file {} cannot be read: {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// It is no TOML. The text is left out: it may hold secrets.
    #[error("{at}: {reason}")]
    Syntax {
        /// Where.
        at: Place,
        /// Why.
        reason: String,
    },
}

/// The files that count, those first that outweigh the others: the one that was named (none for
/// `none`), else those in the XDG directories that exist.
///
/// # Errors
/// When one that exists cannot be read, or the named one does not exist.
pub fn load(
    named: Option<&Path>,
    environment: &Environment,
) -> Result<Vec<ConfigFile>, ConfigFileError> {
    match named {
        Some(path) if path == Path::new(NONE) => Ok(Vec::new()),
        Some(path) => {
            let absent = || ConfigFileError::Unreadable {
                path: path.to_owned(),
                reason: "there is no such file; write --config none to do without".to_owned(),
            };
            Ok(vec![read(path)?.ok_or_else(absent)?])
        }
        None => {
            let paths = environment.config_files();
            let found = paths.iter().map(|path| read(path));
            found.filter_map(Result::transpose).collect()
        }
    }
}

/// `None` if there is no such file.
fn read(path: &Path) -> Result<Option<ConfigFile>, ConfigFileError> {
    let unreadable = |reason: String| ConfigFileError::Unreadable {
        path: path.to_owned(),
        reason,
    };
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(unreadable(error.to_string())),
    };
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        unreadable(format!("it is not UTF-8 (byte {} on)", at + 1))
    })?;
    // Relative paths in it are meant from where it stands, wherever primed runs.
    let path = std::path::absolute(path).map_err(|error| unreadable(error.to_string()))?;
    parse(path, &text).map(Some)
}

fn parse(path: PathBuf, text: &str) -> Result<ConfigFile, ConfigFileError> {
    let at = |span: Range<usize>| place(&path, text, span.start);
    let table = DeTable::parse(text).map_err(|error| ConfigFileError::Syntax {
        at: at(error.span().unwrap_or_default()),
        // Several lines in some cases: what was found, and what is expected.
        reason: error.message().trim_end().replace('\n', "; "),
    })?;
    let mut file = ConfigFile::default();
    let entry = |command: Option<&str>, key: &str, key_at, value: &DeValue<'_>, value_at| Entry {
        command: command.map(str::to_owned),
        key: key.to_owned(),
        key_at,
        value: simple(value),
        value_at,
    };
    for (key, value) in table.get_ref() {
        let name = key.get_ref().as_ref();
        match value.get_ref() {
            DeValue::Table(table) => {
                file.tables.push((name.to_owned(), at(key.span())));
                for (key, value) in table {
                    let places = (at(key.span()), at(value.span()));
                    let (key, value) = (key.get_ref(), value.get_ref());
                    let entry = entry(Some(name), key, places.0, value, places.1);
                    file.entries.push(entry);
                }
            }
            one => {
                let entry = entry(None, name, at(key.span()), one, at(value.span()));
                file.entries.push(entry);
            }
        }
    }
    file.path = path;
    Ok(file)
}

fn place(path: &Path, text: &str, offset: usize) -> Place {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.rsplit('\n').next().unwrap_or_default();
    Place {
        file: path.to_owned(),
        line: before.matches('\n').count() + 1,
        column: line.chars().count() + 1,
    }
}

fn simple(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::Boolean(switch) => Value::Switch(*switch),
        DeValue::Array(array) => {
            let texts = array.iter().map(|one| text_of(one.get_ref()));
            match texts.collect::<Option<Vec<_>>>() {
                Some(texts) => Value::List(texts),
                None => Value::Other("a list of other things than strings and numbers"),
            }
        }
        DeValue::Table(_) => Value::Other("a table"),
        DeValue::Datetime(_) => Value::Other("a date or time"),
        DeValue::String(_) | DeValue::Integer(_) | DeValue::Float(_) => {
            text_of(value).map_or(Value::Other("a number that is none"), Value::Text)
        }
    }
}

/// A string or a number as a flag would be given it.
fn text_of(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Float(float) => Some(float.as_str().to_owned()),
        DeValue::Integer(integer) => {
            let number = i128::from_str_radix(integer.as_str(), integer.radix());
            number.ok().map(|number| number.to_string())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<ConfigFile, ConfigFileError> {
        parse("/etc/primed.toml".into(), text)
    }

    #[test]
    fn values_are_what_flags_take_and_know_their_places() {
        let text = "mode = 'full'\nmax-streams = 0x10\n\nshare = true\nwait = [\n]\n[status]\n  \
                    admin = \"ä\" # x\njson = 1.5\nallow-uid = [1_000, 'b']\nodd = {}\n";
        let file = parsed(text).unwrap();
        let mut entries: Vec<_> = file
            .entries
            .iter()
            .map(|entry| {
                (
                    entry.key_at.line,
                    entry.value_at.column,
                    entry.value.clone(),
                )
            })
            .collect();
        entries.sort_by_key(|entry| entry.0);
        let text = |text: &str| Value::Text(text.to_owned());
        assert_eq!(
            entries,
            [
                (1, 8, text("full")),
                (2, 15, text("16")),
                (4, 9, Value::Switch(true)),
                (5, 8, Value::List(Vec::new())),
                (8, 11, text("ä")),
                (9, 8, text("1.5")),
                (10, 13, Value::List(vec!["1000".to_owned(), "b".to_owned()])),
                (11, 7, Value::Other("a table")),
            ]
        );
        assert_eq!(file.tables[0].0, "status");
        assert_eq!(file.tables[0].1.to_string(), "/etc/primed.toml:7:2");
        let in_table = file.entries.iter().filter(|entry| entry.command.is_some());
        assert_eq!(in_table.count(), 4);
    }

    #[test]
    fn what_is_no_toml_is_named_by_its_place_and_not_repeated() {
        for (text, place) in [
            ("a = 1\nupstream-header = s3cret\n", "/etc/primed.toml:2:19"),
            ("a = 1\na = 2\n", "/etc/primed.toml:2:1"),
            ("[serve\n", "/etc/primed.toml:1:7"),
        ] {
            let said = parsed(text).unwrap_err().to_string();
            assert!(said.starts_with(place), "{said}");
            assert!(!said.contains("s3cret") && !said.contains('\n'), "{said}");
        }
    }
}

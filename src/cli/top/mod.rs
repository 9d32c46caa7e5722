//! `primed top`: what a running primed does, live. `source` asks it once a second, `screen` draws
//! what it said and takes keys; here they are brought together with the terminal.

mod screen;
mod source;

use std::io::{IsTerminal, Write as _};
use std::time::Duration;

use clap::Args;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use self::screen::{Next, Screen};
use super::{AdminAddress, Failure, admin_client, block_on, exit_codes, status};
use crate::address::Address;
use crate::server::STATUS_PATH;
use crate::{clock, task};

/// Watch a running primed: builds, what runs ahead of time, the backend. Without a terminal, print
/// how things stand and end.
#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    admin: AdminAddress,
}

/// How long the terminal is listened to before it is asked whether anybody still wants to know.
const LISTEN: Duration = Duration::from_millis(100);
/// What the terminal said and nobody has dealt with.
const EVENTS: usize = 64;

pub(super) fn run(arguments: Arguments) -> Result<(), Failure> {
    let admin = block_on(async { Ok(arguments.admin.find().await?) })?;
    // Fails here, in a line that stays, where there is no primed at all.
    let page = block_on(admin_client::get(&admin, STATUS_PATH))?;
    let failed = |error: std::io::Error| {
        let message = format!("the terminal cannot be used: {error}");
        Failure::new(exit_codes::FAILURE, message)
    };
    if !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
        let text = status::text(&admin, &page)?;
        return std::io::stdout().write_all(text.as_bytes()).map_err(failed);
    }
    // This also has a panic give the terminal back before it speaks.
    let terminal = ratatui::try_init().map_err(failed)?;
    let watched = block_on(async { watch(admin, terminal).await.map_err(failed) });
    ratatui::restore();
    watched
}

async fn watch(admin: Address, mut terminal: DefaultTerminal) -> std::io::Result<()> {
    let (wanted, wants) = watch::channel(None);
    let (answer, mut answers) = mpsc::channel(1);
    task::spawn("source of top", source::run(admin.clone(), wants, answer));
    let (event, mut events) = mpsc::channel(EVENTS);
    // It is not waited for, but notices within a moment that it is over.
    drop(task::spawn("terminal of top", async {
        task::blocking("terminal of top", move || listen(&event)).await
    }));
    let mut terminated = signal(SignalKind::terminate())?;
    let mut hung_up = signal(SignalKind::hangup())?;
    let mut screen = Screen::new();
    loop {
        terminal.draw(|frame| screen.draw(frame, clock::now_unix_ms()))?;
        tokio::select! {
            Some(answer) = answers.recv() => screen.take(answer),
            event = events.recv() => match event {
                Some(Event::Key(key)) if key.is_press() => match screen.press(key) {
                    Next::Quit => return Ok(()),
                    Next::GoOn => {}
                },
                // Any other, such as another size, has it drawn again.
                Some(_) => {}
                // The terminal is gone.
                None => return Ok(()),
            },
            _ = terminated.recv() => return Ok(()),
            _ = hung_up.recv() => return Ok(()),
        }
        wanted.send_if_modified(|wanted| {
            let changed = *wanted != screen.opened();
            *wanted = screen.opened();
            changed
        });
    }
}

/// Passes on what the terminal says, until nobody listens or it says no more.
fn listen(events: &mpsc::Sender<Event>) {
    while !events.is_closed() {
        match event::poll(LISTEN) {
            Ok(false) => {}
            Ok(true) => match event::read().map(|event| events.blocking_send(event)) {
                Ok(Ok(())) => {}
                _ => return,
            },
            Err(_) => return,
        }
    }
}

//! Runs a program with a time limit, its output kept in a file and looked at as it comes.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// What became of a program.
pub struct Outcome {
    pub status: ExitStatus,
    /// Standard output and standard error together, as they came.
    pub output: String,
    pub wall: Duration,
    /// User and system time of the program and its children.
    pub cpu: Duration,
}

/// What is typed at a program.
pub struct Typed<'a> {
    /// The words of the program that it follows.
    pub after: &'a str,
    pub text: &'a str,
    /// The text is typed once more every second until the program has printed these words, for a reader
    /// who may not be listening yet.
    pub until: Option<&'a str>,
}

impl<'a> Typed<'a> {
    pub fn once(after: &'a str, text: &'a str) -> Self {
        Self {
            after,
            text,
            until: None,
        }
    }
}

/// Runs `command` to its end, which must come within `limit`. Everything it prints goes to `log`.
/// A program that prints one of `fatal` is ended at once: it would only sit there.
pub fn run(command: &mut Command, log: &Path, limit: Duration, fatal: &[&str]) -> Result<Outcome> {
    converse(command, log, limit, fatal, &[])
}

/// The same, and types.
pub fn converse(
    command: &mut Command,
    log: &Path,
    limit: Duration,
    fatal: &[&str],
    typed: &[Typed],
) -> Result<Outcome> {
    let (mut reader, writer) = std::io::pipe().context("cannot create a pipe")?;
    if let Some(folder) = log.parent() {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let mut file = File::create(log).with_context(|| log.display().to_string())?;
    writeln!(file, "# {command:?}").with_context(|| log.display().to_string())?;

    let before = children_time();
    let start = Instant::now();
    let mut child = command
        .stdin(if typed.is_empty() {
            Stdio::null()
        } else {
            Stdio::piped()
        })
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .spawn()
        .with_context(|| format!("cannot start {:?}", command.get_program()))?;
    // The command keeps its copies of the pipe's writing end: give them up, or the pipe never ends.
    command.stdout(Stdio::null()).stderr(Stdio::null());

    let output = Arc::new(Mutex::new(Vec::new()));
    let collector = {
        let output = Arc::clone(&output);
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                // A full disk must not stop the program that is watched.
                let _ = file.write_all(&buffer[..count]);
                output.lock().unwrap().extend_from_slice(&buffer[..count]);
            }
        })
    };

    let mut keyboard = child.stdin.take();
    let mut conversation = Conversation {
        typed,
        answered: 0,
        repeated: None,
    };
    let mut trouble = None;
    let mut searched = 0;
    let status = loop {
        if let Some(status) = child.try_wait().context("cannot wait for the program")? {
            break status;
        }
        if start.elapsed() > limit {
            trouble = Some(format!("no end after {} s", limit.as_secs()));
        } else {
            let output = output.lock().unwrap();
            if let Some(word) = find(&output[searched..], fatal) {
                trouble = Some(format!("it said '{word}'"));
            }
            // A word may have come in part.
            searched = output.len().saturating_sub(64);
            if let Some(keyboard) = &mut keyboard {
                conversation.go_on(&output, keyboard);
            }
        }
        if trouble.is_some() {
            // What follows a panic message is worth having.
            thread::sleep(Duration::from_millis(300));
            child.kill().context("cannot end the program")?;
            break child.wait().context("cannot wait for the program")?;
        }
        thread::sleep(Duration::from_millis(20));
    };
    let wall = start.elapsed();
    let cpu = children_time().saturating_sub(before);
    // A grandchild may still hold the pipe; it is not waited for.
    let patience = Instant::now() + Duration::from_secs(1);
    while !collector.is_finished() && Instant::now() < patience {
        thread::sleep(Duration::from_millis(5));
    }
    if let Some(trouble) = trouble {
        bail!("{trouble}");
    }
    let output = String::from_utf8_lossy(&output.lock().unwrap()).into_owned();
    Ok(Outcome {
        status,
        output,
        wall,
        cpu,
    })
}

/// How far the typing has come.
struct Conversation<'a> {
    /// What is still to be typed.
    typed: &'a [Typed<'a>],
    /// How much of the output has been answered.
    answered: usize,
    /// The first text is being repeated; when it was typed last.
    repeated: Option<Instant>,
}

impl Conversation<'_> {
    fn go_on(&mut self, output: &[u8], keyboard: &mut impl Write) {
        let Some((typed, rest)) = self.typed.split_first() else {
            return;
        };
        let news = &output[self.answered..];
        let due = match self.repeated {
            None => match position(news, typed.after) {
                Some(at) => {
                    self.answered += at + typed.after.len();
                    true
                }
                None => false,
            },
            Some(last) => {
                if typed
                    .until
                    .is_none_or(|words| position(news, words).is_some())
                {
                    self.repeated = None;
                    self.typed = rest;
                    return;
                }
                last.elapsed() >= Duration::from_secs(1)
            }
        };
        if due {
            // A program that does not read any more is about to end, or its limit will tell.
            let _ = keyboard.write_all(typed.text.as_bytes());
            self.repeated = Some(Instant::now());
        }
    }
}

fn find<'a>(output: &[u8], words: &[&'a str]) -> Option<&'a str> {
    words
        .iter()
        .copied()
        .find(|word| position(output, word).is_some())
}

fn position(output: &[u8], word: &str) -> Option<usize> {
    output
        .windows(word.len())
        .position(|window| window == word.as_bytes())
}

/// User and system time of all children that have been waited for (proc(5), stat, fields 16 and 17).
fn children_time() -> Duration {
    const TICKS_PER_SECOND: u64 = 100;
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let ticks: u64 = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(13)
        .take(2)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(name: &str) -> std::path::PathBuf {
        std::env::temp_dir().join(format!("xtask-{}-{name}.log", std::process::id()))
    }

    #[test]
    fn output_of_both_kinds_is_collected_and_kept() {
        let log = log("both");
        let mut command = Command::new("sh");
        command.args(["-c", "echo one; echo two >&2; exit 3"]);
        let outcome = run(&mut command, &log, Duration::from_secs(10), &[]).unwrap();
        assert_eq!(outcome.status.code(), Some(3));
        assert_eq!(outcome.output, "one\ntwo\n");
        assert!(fs::read_to_string(&log).unwrap().ends_with("one\ntwo\n"));
        fs::remove_file(&log).unwrap();
    }

    #[test]
    fn answers_follow_their_questions() {
        let log = log("typed");
        let mut command = Command::new("sh");
        command.args([
            "-c",
            "echo 'name?'; read a; echo 'age?'; read b; echo $a=$b",
        ]);
        let typed = [
            Typed::once("name?", "x\n"),
            Typed {
                after: "age?",
                text: "7\n",
                until: Some("=7"),
            },
        ];
        let outcome = converse(&mut command, &log, Duration::from_secs(10), &[], &typed).unwrap();
        assert!(outcome.output.ends_with("x=7\n"), "{}", outcome.output);
        fs::remove_file(&log).unwrap();
    }

    #[test]
    fn a_program_that_does_not_end_is_ended() {
        let log = log("long");
        let mut command = Command::new("sleep");
        command.arg("60");
        let error = run(&mut command, &log, Duration::from_millis(100), &[])
            .err()
            .unwrap();
        assert!(error.to_string().contains("no end"), "{error}");

        let mut command = Command::new("sh");
        command.args(["-c", "echo Kernel panic; sleep 60"]);
        let error = run(
            &mut command,
            &log,
            Duration::from_secs(60),
            &["Kernel panic"],
        )
        .err()
        .unwrap();
        assert!(error.to_string().contains("Kernel panic"), "{error}");
        fs::remove_file(&log).unwrap();
    }
}

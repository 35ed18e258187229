//! Runs the cases of one driver and prints what became of each.
//!
//! A case fails by panicking.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic;
use std::pin::Pin;
use std::sync::Mutex;
use std::time::Duration;

/// One case may take this long, on a machine with other work.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A longer value is printed as its digest.
const MAX_VALUE_BYTES: usize = 2000;

type Case = Box<dyn FnOnce() -> Pin<Box<dyn Future<Output = String> + Send>> + Send>;

static CASES: Mutex<Vec<(&str, Case)>> = Mutex::new(Vec::new());
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// The way to the database that is under test.
pub fn url() -> String {
    std::env::var("DRIVER_URL").unwrap()
}

/// The way to the same database without the proxy.
pub fn direct_url() -> String {
    std::env::var("DRIVER_DIRECT_URL").unwrap()
}

/// Adds a case. What it returns is compared with what it returns without the proxy,
/// so it holds no process ids, OIDs or times.
pub fn test<Run, Running>(name: &'static str, run: Run)
where
    Run: FnOnce() -> Running + Send + 'static,
    Running: Future<Output = String> + Send + 'static,
{
    let case: Case = Box::new(|| Box::pin(run()));
    CASES.lock().unwrap().push((name, case));
}

/// Runs all cases in turn, and prints a line of JSON for each.
pub fn run() {
    panic::set_hook(Box::new(|panic| {
        PANICS.lock().unwrap().push(panic.to_string());
    }));
    let cases = std::mem::take(&mut *CASES.lock().unwrap());
    for (name, case) in cases {
        // Each has a runtime of its own, so that nothing of it outlasts it.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let running = async { tokio::time::timeout(TIMEOUT, tokio::spawn(case())).await };
        let outcome = match runtime.block_on(running) {
            Ok(Ok(value)) => Ok(shorten(value)),
            Ok(Err(_)) => Err(PANICS.lock().unwrap().join("\n")),
            Err(_) => Err("timed out".to_string()),
        };
        PANICS.lock().unwrap().clear();
        println!(
            "{}",
            serde_json::json!({
                "case": name,
                "ok": outcome.is_ok(),
                "value": outcome.as_ref().ok(),
                "error": outcome.as_ref().err(),
            })
        );
    }
}

fn shorten(value: String) -> String {
    if value.len() <= MAX_VALUE_BYTES {
        return value;
    }
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    format!("{} bytes, {:x}", value.len(), hasher.finish())
}

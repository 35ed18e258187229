//! What belongs to a connection: notifications, settings, tables, locks, cursors.

use crate::connections::{Moving, connect, one, options, run};
use drivers::test;
use futures_util::future::join_all;
use sqlx::postgres::{PgAdvisoryLock, PgListener, PgPool};
use std::time::Duration;

pub fn add() {
    test("listener", listener);
    test("start-up settings", startup_settings);
    test("settings last", settings_last);
    test("temporary table", temporary_table);
    test("advisory lock", advisory_lock);
    test("cursor with hold", cursor_with_hold);
}

async fn hear(listener: &mut PgListener) -> String {
    let note = tokio::time::timeout(Duration::from_secs(5), listener.recv()).await;
    let note = note.expect("nothing heard").unwrap();
    format!("{}: {}", note.channel(), note.payload())
}

async fn listener() -> String {
    let pool = PgPool::connect_with(options()).await.unwrap();
    let mut listener = PgListener::connect_with(&pool).await.unwrap();
    listener.listen_all(["sqlx one", "sqlx_two"]).await.unwrap();
    let mut told = Vec::new();
    let notify = "SELECT pg_notify($1, $2)";
    for number in 0..3 {
        let query = sqlx::query(notify)
            .bind("sqlx one")
            .bind(format!("told {number}"));
        query.execute(&pool).await.unwrap();
        told.push(hear(&mut listener).await);
    }
    listener.unlisten("sqlx one").await.unwrap();
    for channel in ["sqlx one", "sqlx_two"] {
        let query = sqlx::query(notify).bind(channel).bind("told");
        query.execute(&pool).await.unwrap();
    }
    told.push(hear(&mut listener).await);
    // The connection of a listener goes back to the pool when it is dropped.
    drop(listener);
    let query = sqlx::query_scalar("SELECT 1");
    let number: i32 = query.fetch_one(&pool).await.unwrap();
    format!("{told:?} {number}")
}

async fn startup_settings() -> String {
    let settings = [
        ("search_path", "matrix,public"),
        ("work_mem", "7MB"),
        ("TimeZone", "Asia/Kathmandu"),
    ];
    let options = options().application_name("drivers").options(settings);
    let mut moving = Moving::connect_with(options).await;
    let mut told: Vec<String> = Vec::new();
    for _ in 0..3 {
        for query in [
            "SHOW application_name",
            "SHOW search_path",
            "SHOW work_mem",
            "SHOW TimeZone",
            "SELECT 'item'::regclass::text",
        ] {
            told.push(one(moving.connection().await, query).await);
        }
    }
    format!("{told:?}")
}

/// Ten connections at once, each with settings of its own.
async fn settings_last() -> String {
    let all = (0..10).map(|index| async move {
        let mut connection = connect().await;
        let (name, path) = (format!("number {index}"), format!("schema_{index}, public"));
        let set = format!("SET application_name = '{name}'; SET search_path = {path}");
        run(&mut connection, &set).await;
        let set = sqlx::query("SELECT set_config('my.number', $1, false)").bind(&name);
        set.execute(&mut connection).await.unwrap();
        for _ in 0..20 {
            let own: Option<String> =
                one(&mut connection, "SELECT current_setting('my.number', true)").await;
            assert_eq!(own.as_deref(), Some(name.as_str()));
            assert_eq!(
                one::<String>(&mut connection, "SHOW application_name").await,
                name
            );
            assert_eq!(
                one::<String>(&mut connection, "SHOW search_path").await,
                path
            );
        }
    });
    join_all(all).await;
    String::new()
}

async fn temporary_table() -> String {
    let mut moving = Moving::connect().await;
    run(
        moving.connection().await,
        "CREATE TEMPORARY TABLE mine (a int)",
    )
    .await;
    for number in 0..5 {
        let insert = sqlx::query("INSERT INTO mine VALUES ($1)").bind(number);
        insert.execute(moving.connection().await).await.unwrap();
    }
    let sum: i64 = one(moving.connection().await, "SELECT sum(a) FROM mine").await;
    run(moving.connection().await, "DROP TABLE mine").await;
    format!("{sum}")
}

async fn advisory_lock() -> String {
    let lock = PgAdvisoryLock::new("drivers");
    let mut moving = Moving::connect().await;
    let guard = lock.acquire(moving.connection().await).await.unwrap();
    let taken = lock.try_acquire(connect().await).await.unwrap().is_right();
    guard.release_now().await.unwrap();
    let free = lock.try_acquire(connect().await).await.unwrap();
    let is_free = free.is_left();
    format!("{taken} {is_free}")
}

async fn cursor_with_hold() -> String {
    let mut moving = Moving::connect().await;
    let declare = "DECLARE kept CURSOR WITH HOLD FOR SELECT generate_series(1, 10)";
    run(moving.connection().await, declare).await;
    let mut told: Vec<i32> = Vec::new();
    for _ in 0..5 {
        told.push(one(moving.connection().await, "FETCH 1 FROM kept").await);
    }
    run(moving.connection().await, "CLOSE kept").await;
    format!("{told:?}")
}

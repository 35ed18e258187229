//! Statements that the driver keeps, and rows as they come.

use crate::connections::{Moving, one, options, run, state};
use drivers::test;
use futures_util::TryStreamExt;
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection, Either, Executor, Row, SqlSafeStr};
use std::time::Duration;

pub fn add() {
    test("statements again", statements_again);
    test("300 statements", || many_statements(400));
    test("small statement cache", || many_statements(8));
    test("statements not kept", statements_not_kept);
    test("statements cleared", statements_cleared);
    test("changed table", changed_table);
    test("several statements", several_statements);
    test("many rows", many_rows);
    test("rows left unread", rows_left_unread);
    test("query given up", query_given_up);
}

async fn add_to(connection: &mut PgConnection, constant: i32, number: i32) -> i32 {
    let query = AssertSqlSafe(format!("SELECT $1::int + {constant}"));
    let query = sqlx::query_scalar(query).bind(number);
    query.fetch_one(connection).await.unwrap()
}

async fn statements_again() -> String {
    let mut moving = Moving::connect().await;
    let mut told = Vec::new();
    for number in 0..30 {
        told.push(add_to(moving.connection().await, 1, number).await);
        told.push(add_to(moving.connection().await, 2, number).await);
    }
    format!("{told:?}")
}

async fn many_statements(capacity: usize) -> String {
    let options = options().statement_cache_capacity(capacity);
    let mut moving = Moving::connect_with(options).await;
    let mut total = 0;
    for number in 0..600 {
        total += add_to(moving.connection().await, number % 300, 1).await;
    }
    format!("{total}")
}

async fn statements_not_kept() -> String {
    let mut moving = Moving::connect().await;
    let mut told = Vec::new();
    for number in 0..50 {
        let query = sqlx::query_scalar("SELECT $1::int * 2").bind(number);
        let query = query.persistent(false);
        let double: i32 = query.fetch_one(moving.connection().await).await.unwrap();
        told.push(double);
    }
    format!("{told:?}")
}

async fn statements_cleared() -> String {
    let mut moving = Moving::connect().await;
    let mut total = 0;
    for _ in 0..5 {
        for number in 0..10 {
            total += add_to(moving.connection().await, number, 1).await;
        }
        moving
            .connection()
            .await
            .clear_cached_statements()
            .await
            .unwrap();
    }
    let wrong = "SELECT wrong syntax here".into_sql_str();
    let wrong = moving.connection().await.prepare(wrong);
    format!("{total} {}", state(wrong.await))
}

/// The driver keeps a statement whose result is another now, and may say so once.
async fn changed_table() -> String {
    let mut moving = Moving::connect().await;
    let create = "CREATE TABLE matrix.growing (a int); INSERT INTO matrix.growing VALUES (1)";
    run(moving.connection().await, create).await;
    let query = "SELECT * FROM matrix.growing";
    let row = moving.connection().await.fetch_one(query).await.unwrap();
    assert_eq!(row.len(), 1);
    let alter = "ALTER TABLE matrix.growing ADD b text DEFAULT 'two'";
    run(moving.connection().await, alter).await;
    if let Err(error) = moving
        .connection()
        .await
        .fetch_one(sqlx::query(query))
        .await
    {
        assert_eq!(state(Err::<(), _>(error)), "0A000");
    }
    moving
        .connection()
        .await
        .clear_cached_statements()
        .await
        .unwrap();
    let row = moving
        .connection()
        .await
        .fetch_one(sqlx::query(query))
        .await
        .unwrap();
    let told = format!("{} {}", row.len(), row.get::<String, _>(1));
    run(moving.connection().await, "DROP TABLE matrix.growing").await;
    told
}

async fn several_statements() -> String {
    let mut moving = Moving::connect().await;
    let mut told = Vec::new();
    for query in [
        "SELECT 1; SELECT n FROM generate_series(1, 3) n; SET LOCAL work_mem = '5MB'",
        "SELECT 1; SELECT 1/0; SELECT 3",
        "BEGIN; SELECT 4; COMMIT; SELECT 5",
        "",
        "/* nothing */ ; ;",
    ] {
        let connection = moving.connection().await;
        let mut answers = sqlx::raw_sql(query).fetch_many(connection);
        loop {
            match answers.try_next().await {
                Ok(Some(Either::Left(done))) => told.push(format!("{done:?}")),
                Ok(Some(Either::Right(row))) => told.push(row.get::<i32, _>(0).to_string()),
                Ok(None) => break,
                Err(error) => {
                    told.push(state(Err::<(), _>(error)));
                    break;
                }
            }
        }
    }
    format!("{told:?}")
}

async fn many_rows() -> String {
    let mut moving = Moving::connect().await;
    let query = "SELECT n, repeat('x', n % 100) FROM generate_series(1, $1::int) n";
    let mut rows = sqlx::query(query)
        .bind(100_000)
        .fetch(moving.connection().await);
    let (mut sum, mut length) = (0_i64, 0);
    while let Some(row) = rows.try_next().await.unwrap() {
        sum += i64::from(row.get::<i32, _>(0));
        length += row.get::<&str, _>(1).len();
    }
    format!("{sum} {length}")
}

async fn rows_left_unread() -> String {
    let mut moving = Moving::connect().await;
    for _ in 0..3 {
        let query = sqlx::query("SELECT generate_series(1, $1::int)").bind(50_000);
        let mut rows = query.fetch(moving.connection().await);
        for _ in 0..10 {
            assert!(rows.try_next().await.unwrap().is_some());
        }
    }
    one::<i32>(moving.connection().await, "SELECT 1")
        .await
        .to_string()
}

/// A query whose future is dropped runs on; its rows are thrown away when they come.
async fn query_given_up() -> String {
    let mut connection = options_connected().await;
    for _ in 0..3 {
        let given_up = sqlx::query("SELECT pg_sleep(0.2), $1")
            .bind(1)
            .fetch_one(&mut connection);
        let ended = tokio::time::timeout(Duration::from_millis(50), given_up).await;
        assert!(ended.is_err());
        assert_eq!(add_to(&mut connection, 1, 1).await, 2);
    }
    connection.close().await.unwrap();
    String::new()
}

async fn options_connected() -> PgConnection {
    PgConnection::connect_with(&options()).await.unwrap()
}

//! Transactions within transactions, and errors in and out of them.

use crate::connections::{COUNT, INSERT, Moving, connect, one, state};
use drivers::test;
use sqlx::postgres::{PgConnection, PgDatabaseError, PgQueryResult};
use sqlx::{Connection, Error};

pub fn add() {
    test("savepoints", savepoints);
    test("transaction dropped", transaction_dropped);
    test("errors", errors);
    test("failed transaction", failed_transaction);
}

async fn insert(connection: &mut PgConnection, name: &str) -> Result<PgQueryResult, Error> {
    sqlx::query(INSERT).bind(name).execute(connection).await
}

async fn savepoints() -> String {
    let mut moving = Moving::connect().await;
    let connection = moving.connection().await;
    let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ";
    let mut outer = connection.begin_with(begin).await.unwrap();
    insert(&mut outer, "one").await.unwrap();
    let mut inner = outer.begin().await.unwrap();
    insert(&mut inner, "two").await.unwrap();
    let violated = state(insert(&mut inner, "one").await);
    inner.rollback().await.unwrap();
    let mut inner = outer.begin().await.unwrap();
    insert(&mut inner, "three").await.unwrap();
    let mut innermost = inner.begin().await.unwrap();
    insert(&mut innermost, "four").await.unwrap();
    drop(innermost);
    inner.commit().await.unwrap();
    let query = "SELECT array_agg(name ORDER BY id) FROM matrix.item";
    let names: Vec<String> = one(&mut outer, query).await;
    assert_eq!(names, ["one", "three"]);
    let level: String = one(&mut outer, "SHOW transaction_isolation").await;
    outer.rollback().await.unwrap();
    let left: i64 = one(moving.connection().await, COUNT).await;
    format!("{violated} {names:?} {level} {left}")
}

/// The driver rolls back what is dropped before it sends anything else.
async fn transaction_dropped() -> String {
    let mut moving = Moving::connect().await;
    for _ in 0..10 {
        let mut transaction = moving.connection().await.begin().await.unwrap();
        insert(&mut transaction, "lost").await.unwrap();
        drop(transaction);
        assert_eq!(one::<i64>(moving.connection().await, COUNT).await, 0);
    }
    String::new()
}

/// What an error tells, field by field.
async fn errors() -> String {
    let mut moving = Moving::connect().await;
    insert(moving.connection().await, "only").await.unwrap();
    let mut told = Vec::new();
    for _ in 0..3 {
        for (query, parameter) in [
            (INSERT, "only"),
            ("SELECT wrong syntax here", "x"),
            ("SELECT * FROM matrix.nowhere WHERE a = $1", "x"),
            ("SELECT 1 / length($1)", ""),
            ("INSERT INTO matrix.item (id, name) VALUES (NULL, $1)", "x"),
            ("INSERT INTO matrix.item (name, price) VALUES ($1, -1)", "x"),
        ] {
            let query = sqlx::query(query).bind(parameter);
            let error = query.execute(moving.connection().await).await.unwrap_err();
            let error = error.into_database_error().unwrap();
            told.push(format!("{:?}", error.downcast_ref::<PgDatabaseError>()));
            assert_eq!(one::<i32>(moving.connection().await, "SELECT 2").await, 2);
        }
    }
    let delete = sqlx::query("DELETE FROM matrix.item");
    delete.execute(moving.connection().await).await.unwrap();
    format!("{told:?}")
}

async fn failed_transaction() -> String {
    let mut connection = connect().await;
    let mut transaction = connection.begin().await.unwrap();
    insert(&mut transaction, "lost").await.unwrap();
    let divide = sqlx::query("SELECT 1 / $1::int").bind(0);
    let divided = state(divide.execute(&mut *transaction).await);
    let refused = state(insert(&mut transaction, "refused").await);
    // Which rolls back, and is no error to the server.
    transaction.commit().await.unwrap();
    let left: i64 = one(&mut connection, COUNT).await;
    assert_eq!(left, 0);
    format!("{divided} {refused}")
}

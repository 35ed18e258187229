//! Transactions within transactions, and errors in and out of them.

use crate::clients::{COUNT, INSERT, Moving, connect, one, state};
use drivers::test;
use tokio_postgres::IsolationLevel;
use tokio_postgres::types::ToSql;

pub fn add() {
    test("savepoints", savepoints);
    test("transaction dropped", transaction_dropped);
    test("errors", errors);
    test("failed transaction", failed_transaction);
}

async fn savepoints() -> String {
    let mut moving = Moving::connect().await;
    let client = moving.client().await;
    let level = IsolationLevel::RepeatableRead;
    let starting = client.build_transaction().isolation_level(level);
    let mut outer = starting.start().await.unwrap();
    outer.execute(INSERT, &[&"one"]).await.unwrap();
    let inner = outer.savepoint("within").await.unwrap();
    inner.execute(INSERT, &[&"two"]).await.unwrap();
    let violated = state(inner.execute(INSERT, &[&"one"]).await);
    inner.rollback().await.unwrap();
    let mut inner = outer.transaction().await.unwrap();
    inner.execute(INSERT, &[&"three"]).await.unwrap();
    let innermost = inner.transaction().await.unwrap();
    innermost.execute(INSERT, &[&"four"]).await.unwrap();
    innermost.rollback().await.unwrap();
    inner.commit().await.unwrap();
    let row = outer
        .query_one("SELECT array_agg(name ORDER BY id) FROM matrix.item", &[])
        .await
        .unwrap();
    let names: Vec<String> = row.get(0);
    assert_eq!(names, ["one", "three"]);
    let row = outer
        .query_one("SHOW transaction_isolation", &[])
        .await
        .unwrap();
    let level: String = row.get(0);
    outer.rollback().await.unwrap();
    let left: i64 = one(moving.client().await, COUNT, &[]).await;
    format!("{violated} {names:?} {level} {left}")
}

/// The driver rolls back what is dropped, without waiting for it.
async fn transaction_dropped() -> String {
    let mut moving = Moving::connect().await;
    for _ in 0..10 {
        let transaction = moving.client().await.transaction().await.unwrap();
        transaction.execute(INSERT, &[&"lost"]).await.unwrap();
        drop(transaction);
        assert_eq!(one::<i64>(moving.client().await, COUNT, &[]).await, 0);
    }
    String::new()
}

/// What an error tells, field by field.
async fn errors() -> String {
    let mut moving = Moving::connect().await;
    moving
        .client()
        .await
        .execute(INSERT, &[&"only"])
        .await
        .unwrap();
    let mut told = Vec::new();
    let cases: [(&str, &[&(dyn ToSql + Sync)]); 6] = [
        (INSERT, &[&"only"]),
        ("SELECT wrong syntax here", &[]),
        ("SELECT * FROM matrix.nowhere WHERE a = $1", &[&"x"]),
        ("SELECT 1 / $1::int", &[&0]),
        (
            "INSERT INTO matrix.item (id, name) VALUES (NULL, $1)",
            &[&"x"],
        ),
        (
            "INSERT INTO matrix.item (name, price) VALUES ($1, -1)",
            &[&"x"],
        ),
    ];
    for _ in 0..3 {
        for (query, parameters) in cases {
            let error = moving.client().await.execute(query, parameters).await;
            let error = error.unwrap_err();
            told.push(format!("{:?}", error.as_db_error().unwrap()));
            let client = moving.client().await;
            assert_eq!(one::<i32>(client, "SELECT 1 + $1::int", &[&1]).await, 2);
        }
    }
    let client = moving.client().await;
    client
        .execute("DELETE FROM matrix.item", &[])
        .await
        .unwrap();
    format!("{told:?}")
}

async fn failed_transaction() -> String {
    let mut client = connect().await;
    let transaction = client.transaction().await.unwrap();
    transaction.execute(INSERT, &[&"lost"]).await.unwrap();
    let divided = state(transaction.query("SELECT 1 / $1::int", &[&0]).await);
    let refused = state(transaction.query("SELECT $1::int", &[&1]).await);
    // Which rolls back, and is no error to the server.
    transaction.commit().await.unwrap();
    let left: i64 = one(&client, COUNT, &[]).await;
    assert_eq!(left, 0);
    format!("{divided} {refused}")
}

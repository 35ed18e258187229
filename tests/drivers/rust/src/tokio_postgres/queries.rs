//! Prepared statements, and many queries on their way at once.

use crate::clients::{COUNT, INSERT, Moving, connect, one, state, until_it_runs};
use drivers::test;
use futures_util::future::{join_all, try_join_all};
use std::time::Duration;
use tokio_postgres::{Client, NoTls};

pub fn add() {
    test("statements again", statements_again);
    test("300 statements", many_statements);
    test("statements dropped", statements_dropped);
    test("changed table", changed_table);
    test("pipeline", pipeline);
    test("pipeline of statements", pipeline_of_statements);
    test("pipeline with errors", pipeline_with_errors);
    test("cancel", cancel);
    test("query given up", query_given_up);
}

async fn statements_again() -> String {
    let mut moving = Moving::connect().await;
    let client = moving.client().await;
    let add = client.prepare("SELECT $1::int + 1").await.unwrap();
    let client = moving.client().await;
    let multiply = client.prepare("SELECT $1::int * $2::int").await.unwrap();
    let mut told: Vec<i32> = Vec::new();
    for number in 0..30 {
        let row = moving.client().await.query_one(&add, &[&number]).await;
        told.push(row.unwrap().get(0));
        let row = moving
            .client()
            .await
            .query_one(&multiply, &[&number, &3])
            .await;
        told.push(row.unwrap().get(0));
    }
    format!("{told:?}")
}

async fn many_statements() -> String {
    let mut moving = Moving::connect().await;
    let mut statements = Vec::new();
    for number in 0..300 {
        let query = format!("SELECT $1::int * {number}");
        statements.push(moving.client().await.prepare(&query).await.unwrap());
    }
    let mut total = 0;
    for (number, statement) in statements.iter().enumerate().rev() {
        let row = moving.client().await.query_one(statement, &[&2]).await;
        let product: i32 = row.unwrap().get(0);
        assert_eq!(product, 2 * number as i32);
        total += product;
    }
    format!("{total}")
}

/// The driver closes a statement when it is dropped, whatever is on its way then.
async fn statements_dropped() -> String {
    let mut moving = Moving::connect().await;
    let mut total = 0;
    for number in 0..200 {
        let client = moving.client().await;
        let query = format!("SELECT $1::int + {}", number % 7);
        let statement = client.prepare(&query).await.unwrap();
        let row = moving
            .client()
            .await
            .query_one(&statement, &[&number])
            .await;
        total += row.unwrap().get::<_, i32>(0);
    }
    format!("{total}")
}

async fn changed_table() -> String {
    let mut moving = Moving::connect().await;
    let run = "CREATE TABLE matrix.growing (a int); INSERT INTO matrix.growing VALUES (1)";
    moving.client().await.batch_execute(run).await.unwrap();
    let query = "SELECT * FROM matrix.growing";
    let mut columns = 0;
    // On each of the servers that it moves between.
    for _ in 0..4 {
        let client = moving.client().await;
        columns = client.query_one(query, &[]).await.unwrap().len();
    }
    let run = "ALTER TABLE matrix.growing ADD b text DEFAULT 'two'";
    moving.client().await.batch_execute(run).await.unwrap();
    // Prepared anew, since the driver keeps no statement by itself.
    let row = moving.client().await.query_one(query, &[]).await.unwrap();
    let run = "DROP TABLE matrix.growing";
    moving.client().await.batch_execute(run).await.unwrap();
    format!("{columns} {} {}", row.len(), row.get::<_, String>(1))
}

async fn pipeline() -> String {
    let client = connect().await;
    let mut total = 0;
    for _ in 0..3 {
        let queries: Vec<_> = (0..100)
            .map(|n| format!("SELECT $1::int * {}", n % 7))
            .collect();
        let parameters: Vec<i32> = (0..100).collect();
        let asked = queries.iter().zip(&parameters).map(|(query, number)| {
            let client = &client;
            async move { client.query_one(query, &[number]).await }
        });
        for (number, row) in try_join_all(asked).await.unwrap().iter().enumerate() {
            let product: i32 = row.get(0);
            assert_eq!(product as usize, number * (number % 7));
            total += product;
        }
    }
    format!("{total}")
}

async fn pipeline_of_statements() -> String {
    let client = connect().await;
    let queries: Vec<_> = (0..7).map(|n| format!("SELECT $1::int * {n}")).collect();
    let prepared = queries.iter().map(|query| client.prepare(query));
    let statements = try_join_all(prepared).await.unwrap();
    let parameters: Vec<i32> = (0..500).collect();
    let asked = parameters.iter().map(|number| {
        let (client, statement) = (&client, &statements[*number as usize % 7]);
        async move { client.query_one(statement, &[number]).await }
    });
    let rows = try_join_all(asked).await.unwrap();
    let products: Vec<i32> = rows.iter().map(|row| row.get(0)).collect();
    let expected: Vec<i32> = parameters.iter().map(|n| n * (n % 7)).collect();
    assert_eq!(products, expected);
    format!("{products:?}")
}

/// Each query of the driver's ends with a Sync, so that errors stay alone.
async fn pipeline_with_errors() -> String {
    let client = connect().await;
    let mut told = Vec::new();
    let statement = client.prepare("SELECT 6 / $1::int").await.unwrap();
    for _ in 0..3 {
        let divisors = [1, 0, 2, 0, 3];
        let asked = divisors.iter().map(|divisor| {
            let (client, statement) = (&client, &statement);
            async move { client.query_one(statement, &[divisor]).await }
        });
        for answer in join_all(asked).await {
            match answer {
                Ok(row) => told.push(row.get::<_, i32>(0).to_string()),
                Err(error) => told.push(error.code().unwrap().code().to_string()),
            }
        }
        let (first, second, third) = tokio::join!(
            client.simple_query("SELECT 1; SELECT 1/0; SELECT 2"),
            client.execute(INSERT, &[&"kept"]),
            client.query("SELECT wrong syntax here", &[]),
        );
        told.extend([state(first), second.unwrap().to_string(), state(third)]);
        assert_eq!(one::<i64>(&client, COUNT, &[]).await, 1);
        client
            .execute("DELETE FROM matrix.item", &[])
            .await
            .unwrap();
    }
    format!("{told:?}")
}

async fn cancel_once(client: &Client, query: &str) -> String {
    let token = client.cancel_token();
    let (ended, ()) = tokio::join!(client.batch_execute(query), async {
        until_it_runs(query).await;
        token.cancel_query(NoTls).await.unwrap();
    });
    state(ended)
}

async fn cancel() -> String {
    let client = connect().await;
    let mut told = Vec::new();
    for number in 0..3 {
        let query = format!("SELECT pg_sleep(60) /* tokio-postgres: cancel {number} */");
        told.push(cancel_once(&client, &query).await);
        assert_eq!(one::<i32>(&client, "SELECT 1", &[]).await, 1);
    }
    client.batch_execute("BEGIN").await.unwrap();
    let query = "SELECT pg_sleep(60) /* tokio-postgres: cancel in a transaction */";
    told.push(cancel_once(&client, query).await);
    told.push(state(client.query("SELECT 1", &[]).await));
    client.batch_execute("ROLLBACK").await.unwrap();
    // A token outlives the connection that it is of, and does no harm then.
    let token = client.cancel_token();
    drop(client);
    let _ = token.cancel_query(NoTls).await;
    format!("{told:?}")
}

/// A query whose future is dropped runs on; the connection answers the next in turn.
async fn query_given_up() -> String {
    let client = connect().await;
    for _ in 0..3 {
        let given_up = client.query("SELECT pg_sleep(0.2)", &[]);
        let ended = tokio::time::timeout(Duration::from_millis(20), given_up).await;
        assert!(ended.is_err());
        assert_eq!(one::<i32>(&client, "SELECT $1 + 1", &[&1]).await, 2);
    }
    String::new()
}

//! Results in parts: streams, portals, cursors.

use crate::clients::{Moving, connect, one};
use drivers::test;
use futures_util::{TryStreamExt, pin_mut};
use tokio_postgres::Row;

pub fn add() {
    test("many rows", many_rows);
    test("rows left unread", rows_left_unread);
    test("portals", portals);
    test("cursor with hold", cursor_with_hold);
}

const SERIES: &str = "SELECT generate_series(1, $1::int)";

fn sum(rows: &[Row]) -> i32 {
    rows.iter().map(|row| row.get::<_, i32>(0)).sum()
}

async fn many_rows() -> String {
    let mut moving = Moving::connect().await;
    let query = "SELECT n, repeat('x', n % 100) FROM generate_series(1, $1::int) n";
    let client = moving.client().await;
    let rows = client.query_raw(query, [&100_000]).await.unwrap();
    pin_mut!(rows);
    let (mut sum, mut length) = (0_i64, 0);
    while let Some(row) = rows.try_next().await.unwrap() {
        sum += i64::from(row.get::<_, i32>(0));
        length += row.get::<_, &str>(1).len();
    }
    format!("{sum} {length} {:?}", rows.rows_affected())
}

async fn rows_left_unread() -> String {
    let mut moving = Moving::connect().await;
    for _ in 0..3 {
        let rows = moving
            .client()
            .await
            .query_raw(SERIES, [&50_000])
            .await
            .unwrap();
        pin_mut!(rows);
        for _ in 0..10 {
            assert!(rows.try_next().await.unwrap().is_some());
        }
    }
    one::<i32>(moving.client().await, "SELECT 1", &[])
        .await
        .to_string()
}

/// Two portals of one statement, in turns and with limits of rows.
async fn portals() -> String {
    let mut client = connect().await;
    let mut told = Vec::new();
    let statement = client.prepare(SERIES).await.unwrap();
    for _ in 0..3 {
        let transaction = client.transaction().await.unwrap();
        let first = transaction.bind(&statement, &[&1000]).await.unwrap();
        let second = transaction.bind(&statement, &[&10]).await.unwrap();
        for (portal, limit) in [(&first, 300), (&second, 4), (&first, 300), (&second, 0)] {
            let rows = transaction.query_portal(portal, limit).await.unwrap();
            told.push((rows.len(), sum(&rows)));
        }
        let other = transaction.query(SERIES, &[&5]).await.unwrap();
        told.push((other.len(), sum(&other)));
        let rows = transaction.query_portal(&first, 0).await.unwrap();
        told.push((rows.len(), sum(&rows)));
        drop(second);
        let rows = transaction.query_portal(&first, 1).await.unwrap();
        told.push((rows.len(), sum(&rows)));
        transaction.commit().await.unwrap();
    }
    format!("{told:?}")
}

async fn cursor_with_hold() -> String {
    let mut moving = Moving::connect().await;
    let declare = "DECLARE kept CURSOR WITH HOLD FOR SELECT generate_series(1, 10)";
    moving.client().await.batch_execute(declare).await.unwrap();
    let first = moving.client().await.query("FETCH 4 FROM kept", &[]).await;
    let rest = moving
        .client()
        .await
        .query("FETCH ALL FROM kept", &[])
        .await;
    moving
        .client()
        .await
        .batch_execute("CLOSE kept")
        .await
        .unwrap();
    format!("{} {}", sum(&first.unwrap()), sum(&rest.unwrap()))
}

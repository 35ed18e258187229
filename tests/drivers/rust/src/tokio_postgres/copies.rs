//! COPY both ways, as text and binary.

use crate::clients::{COUNT, Moving, one, state};
use bytes::Bytes;
use drivers::test;
use futures_util::{SinkExt, StreamExt, TryStreamExt, pin_mut, stream};
use tokio_postgres::binary_copy::{BinaryCopyInWriter, BinaryCopyOutStream};
use tokio_postgres::types::Type;

pub fn add() {
    test("copy", copy);
    test("copy binary", copy_binary);
    test("copy broken off", copy_broken_off);
    test("copy refused", copy_refused);
    test("copy left unread", copy_left_unread);
}

const COPY_IN: &str = "COPY matrix.item (id, name) FROM STDIN";

async fn empty(moving: &mut Moving) {
    let client = moving.client().await;
    client
        .execute("DELETE FROM matrix.item", &[])
        .await
        .unwrap();
}

async fn copy() -> String {
    let mut moving = Moving::connect().await;
    empty(&mut moving).await;
    let lines: Vec<_> = (0..50_000)
        .map(|n| Bytes::from(format!("{n},\"a \"\"quoted\"\" name, {n}\"\n")))
        .collect();
    let copy = "COPY matrix.item (id, name) FROM STDIN (FORMAT csv)";
    let sink = moving.client().await.copy_in(copy).await.unwrap();
    pin_mut!(sink);
    let mut all = stream::iter(lines.clone()).map(Ok);
    sink.send_all(&mut all).await.unwrap();
    let count = sink.finish().await.unwrap();
    let copy = "COPY (SELECT id, name FROM matrix.item ORDER BY id) TO STDOUT (FORMAT csv)";
    let out = moving.client().await.copy_out(copy).await.unwrap();
    let back: Vec<Bytes> = out.try_collect().await.unwrap();
    assert!(back == lines);
    format!("{count}")
}

async fn copy_binary() -> String {
    let mut moving = Moving::connect().await;
    empty(&mut moving).await;
    let types = [Type::INT4, Type::TEXT];
    let transaction = moving.client().await.transaction().await.unwrap();
    let copy = "COPY matrix.item (id, name) FROM STDIN (FORMAT binary)";
    let sink = transaction.copy_in(copy).await.unwrap();
    let writer = BinaryCopyInWriter::new(sink, &types);
    pin_mut!(writer);
    for number in 0..5000 {
        let name = format!("name\t{number}\n\\");
        writer.as_mut().write(&[&number, &name]).await.unwrap();
    }
    let count = writer.finish().await.unwrap();
    let copy = "COPY (SELECT id, name FROM matrix.item ORDER BY id) TO STDOUT (FORMAT binary)";
    let out = transaction.copy_out(copy).await.unwrap();
    let rows: Vec<_> = BinaryCopyOutStream::new(out, &types)
        .try_collect()
        .await
        .unwrap();
    for (number, row) in rows.iter().enumerate() {
        assert_eq!(row.get::<i32>(0), number as i32);
        assert_eq!(row.get::<&str>(1), format!("name\t{number}\n\\"));
    }
    transaction.rollback().await.unwrap();
    let left: i64 = one(moving.client().await, COUNT, &[]).await;
    format!("{count} {} {left}", rows.len())
}

/// A sink that is dropped breaks its copy off.
async fn copy_broken_off() -> String {
    let mut moving = Moving::connect().await;
    empty(&mut moving).await;
    for _ in 0..3 {
        let sink = moving.client().await.copy_in(COPY_IN).await.unwrap();
        let mut sink = Box::pin(sink);
        sink.send(Bytes::from_static(b"1\tone\n")).await.unwrap();
        drop(sink);
        assert_eq!(one::<i64>(moving.client().await, COUNT, &[]).await, 0);
    }
    // One that the server refuses early, while much more is sent.
    let sink = moving.client().await.copy_in(COPY_IN).await.unwrap();
    pin_mut!(sink);
    let rows = Bytes::from("not a number\tx\n".repeat(1000));
    let mut all = stream::iter(vec![rows; 100]).map(Ok);
    let sent = sink.send_all(&mut all).await;
    state(match sent {
        Ok(()) => sink.finish().await,
        Err(error) => Err(error),
    })
}

async fn copy_refused() -> String {
    let mut moving = Moving::connect().await;
    let mut told = Vec::new();
    let copy = "COPY matrix.nowhere FROM STDIN";
    let refused = moving.client().await.copy_in::<_, Bytes>(copy).await;
    told.push(state(refused.map(drop)));
    // The driver breaks off what never began, and closes when that is answered.
    moving = Moving::connect().await;
    let copy = "COPY (SELECT 1/(3-n) FROM generate_series(1, 9) n) TO STDOUT";
    let out = moving.client().await.copy_out(copy).await.unwrap();
    told.push(state(out.try_collect::<Vec<_>>().await));
    told.push(
        one::<i64>(moving.client().await, COUNT, &[])
            .await
            .to_string(),
    );
    format!("{told:?}")
}

async fn copy_left_unread() -> String {
    let mut moving = Moving::connect().await;
    let copy = "COPY (SELECT repeat('x', 1000) FROM generate_series(1, 20000)) TO STDOUT";
    for _ in 0..3 {
        let out = moving.client().await.copy_out(copy).await.unwrap();
        let mut out = Box::pin(out);
        assert!(out.try_next().await.unwrap().is_some());
    }
    one::<i32>(moving.client().await, "SELECT 1", &[])
        .await
        .to_string()
}

//! Clients by the URL under test, and what cases do with them.

use futures_util::{StreamExt, stream};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio_postgres::types::{FromSqlOwned, ToSql};
use tokio_postgres::{AsyncMessage, Client, Config, Error, NoTls};

pub const INSERT: &str = "INSERT INTO matrix.item (name) VALUES ($1)";
pub const COUNT: &str = "SELECT count(*) FROM matrix.item";

pub fn config() -> Config {
    drivers::url().parse().unwrap()
}

pub async fn connect() -> Client {
    connect_with(config()).await
}

pub async fn connect_direct() -> Client {
    connect_with(drivers::direct_url().parse().unwrap()).await
}

pub async fn connect_with(config: Config) -> Client {
    let (client, connection) = config.connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// Connects, and returns what the server says unasked, too.
pub async fn connect_hearing() -> (Client, UnboundedReceiver<AsyncMessage>) {
    let (client, mut connection) = config().connect(NoTls).await.unwrap();
    let (sender, receiver) = unbounded_channel();
    tokio::spawn(async move {
        let mut messages = stream::poll_fn(move |context| connection.poll_message(context));
        while let Some(Ok(message)) = messages.next().await {
            let _ = sender.send(message);
        }
    });
    (client, receiver)
}

/// A client that a pool gives another server whenever it is asked for: one of two
/// rivals begins a transaction on the server that was used last, and the other gives
/// back the one that it held.
pub struct Moving {
    own: Client,
    idle: Client,
    holding: Client,
}

impl Moving {
    pub async fn connect() -> Moving {
        Moving::connect_with(config()).await
    }

    pub async fn connect_with(config: Config) -> Moving {
        let holding = connect().await;
        holding.batch_execute("BEGIN").await.unwrap();
        Moving {
            own: connect_with(config).await,
            idle: connect().await,
            holding,
        }
    }

    pub async fn client(&mut self) -> &mut Client {
        self.idle.batch_execute("BEGIN").await.unwrap();
        self.holding.batch_execute("COMMIT").await.unwrap();
        std::mem::swap(&mut self.idle, &mut self.holding);
        &mut self.own
    }
}

/// Runs a query that answers one row of one column.
pub async fn one<T: FromSqlOwned>(
    client: &Client,
    query: &str,
    parameters: &[&(dyn ToSql + Sync)],
) -> T {
    client.query_one(query, parameters).await.unwrap().get(0)
}

/// The SQLSTATE of what must have failed on the server.
pub fn state<T>(result: Result<T, Error>) -> String {
    let Err(error) = result else {
        panic!("no error");
    };
    match error.code() {
        Some(code) => code.code().to_string(),
        None => panic!("not an error of Postgres: {error:?}"),
    }
}

/// Returns when the server runs a query.
pub async fn until_it_runs(query: &str) {
    let other = connect_direct().await;
    let running = "SELECT count(*) FROM pg_stat_activity WHERE query = $1 AND state = 'active'";
    while one::<i64>(&other, running, &[&query]).await == 0 {}
}

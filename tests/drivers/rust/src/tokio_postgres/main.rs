//! tokio-postgres and its pool, deadpool: statements, pipelines, portals, COPY.

mod clients;
mod copies;
mod pools;
mod queries;
mod rows;
mod sessions;
mod transactions;
mod values;

fn main() {
    values::add();
    queries::add();
    transactions::add();
    rows::add();
    copies::add();
    sessions::add();
    pools::add();
    drivers::run();
}
